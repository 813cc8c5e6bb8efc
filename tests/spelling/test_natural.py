"""WikiText's form -> natural spelling, and there and back again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.spelling import WordFeed, detokenise


def forms_of(text: str) -> list[str]:
    """The model's words of a text, `<eos>` for a line end."""
    feed = WordFeed("plain")
    words = feed.read(text) + feed.finish()
    return [form for word in words for form in (word.forms or ("<eos>",))]


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! How are you?",
        'He said: "Go on; why not?" She didn\'t.',
        "It cost $4.50 (about £3), or 1,000,000 in all.",
        "A well-known, 18-year-old dog; the dogs' owner isn't John's friend.",
        "From 1914–18—or 5% less—at 90 km/h, by 17:10.",
        "Mr. Hill of the U.S. met Dr. Ray at No. 5, St. Ives.",
        "She called it 'the end' of all things. \"'Tis so,\" he said.",
        "At 30°C the R&B band [sic] played on... and on.",
        'One line.\nThen "another" one!\n',
        "Look up foo_bar in the index.",
        "",
    ],
)
def test_there_and_back(text: str) -> None:
    assert detokenise(forms_of(text)) == text


def test_line_ends_and_unknown_words() -> None:
    assert (
        detokenise(["The", "<unk>", "'s", "end", ".", "<eos>", "Then"]) == "The <unk> 's end.\nThen"
    )
    assert detokenise([]) == ""
    assert detokenise(["<eos>"]) == "\n"


def test_an_open_quote_does_not_reach_into_the_next_line() -> None:
    assert detokenise(['"', "a", "<eos>", '"', "b", '"']) == '"a\n"b"'


_WORDS = "the a Hill river isn't John's well-known U.S. Mr. No. 1,000 3.5 $5"
_WORD = st.sampled_from(_WORDS.split())
_PLAIN = st.lists(_WORD, min_size=1, max_size=6).map(" ".join)
_CLAUSE = st.one_of(
    _PLAIN,
    _PLAIN.map('"{}"'.format),
    _PLAIN.map("({})".format),
    _PLAIN.map("{}, so".format),
    _PLAIN.map("{}: so".format),
    _PLAIN.map("{}... so".format),
)
_LINE = st.lists(_CLAUSE, min_size=1, max_size=4).flatmap(
    lambda clauses: st.sampled_from([" then ".join(clauses) + end for end in ("!", "?", " end.")])
)


@given(st.lists(_LINE, max_size=4).map("\n".join))
def test_usual_english_comes_back_as_it_was(text: str) -> None:
    assert detokenise(forms_of(text)) == text


@given(st.lists(_LINE, max_size=4).map("\n".join))
def test_natural_spelling_gives_the_same_words(text: str) -> None:
    forms = forms_of(text)
    assert forms_of(detokenise(forms)) == forms
