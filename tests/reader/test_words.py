"""The word-boundary correction of surprisal, and the table's schema."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlm.reader.words import corrected, schema


def test_corrected_words_sum_to_all_pieces_and_the_last_boundary() -> None:
    rng = np.random.default_rng(0)
    nll, boundary = rng.random(9), rng.random(10)
    first = np.array([0, 2, 3, 7])
    got = corrected(nll, boundary, first)
    assert got.sum() == pytest.approx(nll.sum() + boundary[-1])
    assert got[1] == pytest.approx(nll[2] - boundary[2] + boundary[3])


def test_the_first_boundary_counts_only_where_the_text_goes_on() -> None:
    nll, boundary = np.array([1.0, 2.0]), np.array([0.25, 0.5, 0.125])
    first = np.array([0, 1])
    assert corrected(nll, boundary, first).tolist() == [1.5, 1.625]
    assert corrected(nll, boundary, first, opens=False).tolist() == [1.25, 1.625]


def test_no_words_have_no_surprisal() -> None:
    assert corrected(np.zeros(0), np.zeros(1), np.zeros(0, dtype=int)).tolist() == []


def test_every_column_states_its_unit_and_its_rule() -> None:
    found = schema(["rms", "static", "sgd+cache"], ["rank"], {"model": "x"})
    assert all(b"unit" in field.metadata for field in found)
    assert found.field("surprisal").metadata[b"rule"] == b"rms"
    assert found.names[-3:] == ["surprisal_sgd_cache", "surprisal_sgd_cache_plain", "rank"]
    assert json.loads(found.metadata[b"mlm"]) == {"model": "x"}
