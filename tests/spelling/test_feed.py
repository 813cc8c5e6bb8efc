"""The feed of words: offsets, chunks, line ends, sentences, bytes, hostile texts, time."""

from __future__ import annotations

import copy
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.base.errors import UserError
from mlm.spelling import FORMS, Word, WordFeed
from mlm.text.articles import count_words

_BITS = (
    *("word", "The", "end.", "etc.", "No.", "5", "U.S.", "it's", '"', "“so”", ")", "a--b", "1,5"),
    *(" ", "  ", "\n", "\r", "\r\n", "\n\n", "\t", "\u00a0", "\u2028", "\x0b", "\ufeff", "…"),
    *("#", "##", "-", "1.", "```", "= A =", "<unk>", "👩‍👧", "é", "हिन्दी", ".", "!", "?"),
)
TEXTS = st.lists(st.sampled_from(_BITS), max_size=20).map("".join) | st.text(max_size=40)


def words_of(text: str, form: str = "plain") -> list[Word]:
    feed = WordFeed(form)
    return feed.read(text) + feed.finish()


def shown(text: str, form: str) -> list[str]:
    """Words and line ends, one string for each."""
    return ["¶" if w.line_end else " ".join(w.forms) for w in words_of(text, form)]


# ---------------------------------------------------------------- offsets and chunks


@given(TEXTS, st.sampled_from(FORMS))
def test_words_and_blanks_are_the_text(text: str, form: str) -> None:
    at, made = 0, ""
    for word in words_of(text, form):
        assert word.text == text[word.start : word.end]
        assert at <= word.start <= word.end
        assert word.line_end == (word.forms == ())
        assert word.line_end or word.text.split() == [word.text]
        made += text[at : word.start] + word.text
        blank = text[at : word.start]
        assert not blank.removeprefix("\ufeff" if at == 0 else "").strip()
        at = word.end
    rest = text[at:]
    assert made + rest == text
    assert not rest.removeprefix("\ufeff" if at == 0 else "").strip()


@given(TEXTS, st.sampled_from(FORMS), st.lists(st.integers(0, 6), max_size=60))
def test_chunks_do_not_change_the_words(text: str, form: str, sizes: list[int]) -> None:
    feed, words, at = WordFeed(form), [], 0
    for size in sizes:
        words += feed.read(text[at : at + size])
        at += size
    words += feed.read(text[at:]) + feed.finish()
    whole = WordFeed(form)
    assert words == whole.read(text) + whole.finish()
    assert feed.canonical_bytes == whole.canonical_bytes


def test_what_only_begins_like_a_mark_opens_no_line() -> None:
    text = "a\n-b c\n#no d\n1.5 e\n```f` g\n- h\n## i"
    feed = WordFeed("markdown")
    letters = [word for letter in text for word in feed.read(letter)] + feed.finish()
    assert letters == words_of(text, "markdown")
    assert sum(word.line_end for word in letters) == 2


def test_texts_longer_than_a_block_equal_chunks() -> None:
    text = "A well-known end. Then 3.5 more,\r\n\r\nso # No. 5\n" * 1600
    for form in FORMS:
        feed, pieces = WordFeed(form), []
        for start in range(0, len(text), 777):
            pieces += feed.read(text[start : start + 777])
        assert pieces + feed.finish() == words_of(text, form)


@pytest.mark.parametrize("form", FORMS)
def test_little_is_held_back(form: str) -> None:
    feed, handed = WordFeed(form), 0
    for number in range(1, 50):
        handed += sum(not word.line_end for word in feed.read(f"word{number}, \n\n"))
        assert handed >= number - 3


@pytest.mark.parametrize("form", FORMS)
def test_a_feed_begins_again_after_a_document(form: str) -> None:
    text = "One. Two\n\n# Three\n```\nopen"
    feed = WordFeed(form)
    first = feed.read(text) + feed.finish()
    size = feed.canonical_bytes
    assert feed.read(text) + feed.finish() == first
    assert feed.canonical_bytes == size
    assert feed.finish() == []
    assert feed.canonical_bytes == 0


def test_a_copy_reads_on_by_itself() -> None:
    feed = WordFeed("markdown")
    feed.read("# A title\nand so")
    twin = copy.deepcopy(feed)
    rest = feed.read(" on. Then") + feed.finish()
    assert twin.read(" on. Then") + twin.finish() == rest


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UserError, match="plain, wrapped, wikitext, markdown"):
        WordFeed("html")


# ---------------------------------------------------------------- line ends


@pytest.mark.parametrize("form", FORMS)
def test_empty_texts_and_one_word(form: str) -> None:
    assert words_of("", form) == []
    assert words_of("\ufeff", form) == [] or form == "wikitext"
    assert [w.text for w in words_of("word", form) if not w.line_end] == ["word"]
    if form != "wikitext":
        assert words_of(" \n\r\n \t", form) == []
        assert words_of("word", form) == [Word("word", 0, 4, ("word",), False, 0)]


def test_plain_newlines_end_lines() -> None:
    assert shown("a\nb", "plain") == ["a", "¶", "b"]
    assert shown("\n a \r\n \n\tb \r c\n", "plain") == ["a", "¶", "b", "¶", "c", "¶"]
    words = words_of("\n a \r\n \n\tb", "plain")
    assert [(w.text, w.start) for w in words] == [("a", 2), (" \r\n \n\t", 3), ("b", 9)]


def test_wrapped_lines_end_at_blank_lines() -> None:
    text = "one\ntwo\r\nthree\n \n\n four\rfive\r\n\r\nsix\n"
    expected = ["one", "two", "three", "¶", "four", "five", "¶", "six", "¶"]
    assert shown(text, "wrapped") == expected


def test_markdown_keeps_headings_items_and_fenced_lines() -> None:
    text = (
        "# The title\nText that\ngoes on.\n## A part ##\n- one\n  more\n- two\n1. three\n"
        "```py\nx = 1\n\n# y\n```\nafter\nthat\n\n#\n####### no\n#hash tag\n"
    )
    assert " ".join(shown(text, "markdown")) == (
        "= The title = ¶ Text that goes on . ¶ = = A part = = ¶ - one ¶ more ¶ - two ¶ 1 . three ¶ "
        "```py ¶ x = 1 ¶ # y ¶ ``` ¶ after that ¶ = = ¶ # # # # # # # no # hash tag ¶"
    )


def test_a_byte_order_mark_is_no_text() -> None:
    assert words_of("\ufeffa b")[0] == Word("a", 1, 2, ("a",), False, 0)
    assert words_of("a \ufeffb")[1].text == "\ufeffb"


@given(TEXTS)
def test_wikitext_counts_its_words_as_perplexities_do(text: str) -> None:
    text = text.replace("\ufeff", "")
    words = words_of(text, "wikitext")
    assert len(words) == count_words(text)
    assert [w.text for w in words if not w.line_end] == text.split()
    assert all(w.forms == (w.text,) for w in words if not w.line_end)


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One two. Three! Four? Five", "00123"),
        ('He "left." (Then so.) End', "00112"),
        ("Mr. Hill of the U.S. left. So", "0000001"),
        ("One\ntwo three\n", "00111"),
        ("猫。 犬", "01"),
        ("wait... what", "00"),
    ],
)
def test_sentences(text: str, sentences: str) -> None:
    assert "".join(str(word.sentence) for word in words_of(text)) == sentences


def test_sentences_of_wikitext() -> None:
    text = ' \n = A = \n \n He said , " Go . " ( So . ) " No ! " \n Then . \n'
    found = words_of(text, "wikitext")
    sentences = [
        " ".join(w.text for w in group if not w.line_end)
        for _, group in itertools.groupby(found, lambda word: word.sentence)
    ]
    assert sentences == ["= A =", 'He said , " Go . "', "( So . )", '" No ! "', "Then ."]


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("“It’s”  so…\u00a0well\r\n\r\n\n then ", '"It\'s" so... well\nthen'),
        ("\ufeff \n a", "a"),
        ("é", "é"),
        ("", ""),
    ],
)
def test_white_space_and_typography_cost_no_bytes(text: str, canonical: str) -> None:
    for source in (text, canonical):
        feed = WordFeed("plain")
        feed.read(source)
        feed.finish()
        assert feed.canonical_bytes == len(canonical.encode())


@given(TEXTS, st.sampled_from(FORMS))
def test_bytes_add_up_word_by_word(text: str, form: str) -> None:
    feed = WordFeed(form)
    words = feed.read(text)
    part = feed.canonical_bytes
    words += feed.finish()
    assert part <= feed.canonical_bytes
    if form == "wikitext":
        lines = [line.split() for line in text.removeprefix("\ufeff").split("\n")]
        size = sum(len(" ".join(line).encode()) for line in lines)
        assert feed.canonical_bytes == size + sum(word.line_end for word in words)


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("form", ["plain", "markdown"])
@pytest.mark.parametrize("text", ["x", " ", "\n", "word x"])
def test_a_long_word_in_many_chunks_takes_linear_time(text: str, form: str) -> None:
    feed, began = WordFeed(form), time.process_time()
    feed.read(text)
    for _ in range(40_000):
        feed.read(text[-1] * 10)
    feed.finish()
    assert time.process_time() - began < 2  # 8 GB would be copied in quadratic time


@pytest.mark.parametrize("unit", ["word ", "a.b", "a-b", "''", "1,", "..", "#", "👍\u200d"])
def test_a_long_text_takes_linear_time(unit: str) -> None:
    for form in FORMS:
        began = time.process_time()
        words_of(unit * 20_000, form)
        assert time.process_time() - began < 2
