"""The canonical text and the price of spelling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.spelling import WordFeed, canonical_characters, canonical_text, spelling_nats


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("\n", "\n"),
        ("  a \t b\r\n\n c", "a b\n\nc\n"),
        ("a\u00a0b\u2028c\x85d", "a b c d\n"),
        ("a\u200bb e\u0301 ﬁ", "a\u200bb e\u0301 ﬁ\n"),
        ("\u2581x\u2581 \ud83d", "_x_ \ufffd\n"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert canonical_text(text) == canonical


@given(st.text(st.characters() | st.sampled_from(" \n\t\u2581\u00a0\r\ud800")))
def test_it_is_a_fixed_point_in_utf8(text: str) -> None:
    once = canonical_text(text)
    assert canonical_text(once) == once
    assert once.encode().decode() == once


@given(st.text(st.characters() | st.sampled_from(" \n\t\u2581\u00a0\r\ud800")))
def test_reading_wikitexts_form_counts_canonical_bytes(text: str) -> None:
    feed = WordFeed("wikitext")
    feed.read("a " + text)
    feed.finish()
    assert feed.canonical_bytes == len(canonical_text("a " + text).encode())


def test_spelling_costs_every_byte_and_an_end() -> None:
    assert spelling_nats(2) == pytest.approx(3 * math.log(257))
    assert spelling_nats(np.array([0, 1])).tolist() == pytest.approx(
        [math.log(257), 2 * math.log(257)]
    )
    assert canonical_characters("plain") == "plain"
