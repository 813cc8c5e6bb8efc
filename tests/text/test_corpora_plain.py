"""Plain texts as corpora: one file, a directory of files, what is divided, names of results."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest

from mlm.base.errors import UserError
from mlm.text.articles import SPLITS, Article, Corpus, count_words
from mlm.text.corpora import open_corpus, results_name
from mlm.text.encoding import encode_articles
from mlm.text.vocabulary import fit_vocabulary

TITLED = " \n = One = \n \n a b . \n \n = Two = \n \n c d . \n"
WRAPPED = (
    "The keeper of the lamp had not slept. He climbed\n"
    "the stair, counted the steps, and found that\n"
    "one of them was missing. Nobody had told him how\n"
    "many there were.\n\nSo he went down.\n"
)


def folder_of(path: Path, count: int) -> Path:
    """A directory of plain files, one without a word among them."""
    path.mkdir()
    for number in range(count):
        (path / f"story {number:02}.txt").write_text(f"It's story number {number}.\n")
    return path


def titles(corpus: Corpus, split: str) -> list[str]:
    return [article.title for article in corpus.articles(split)]


@pytest.mark.parametrize(
    ("text", "converted"),
    [
        ("Hello, world!\n\nIt's me", "Hello , world !\nIt 's me\n"),
        ("\ufeff“Hello…”\r\n\r\n", '" Hello ... "\n'),
        ("# A b\n\ntext\nmore\n", "= A b =\ntext more\n"),
        (
            WRAPPED,
            "The keeper of the lamp had not slept . He climbed the stair , counted the steps , and "
            "found that one of them was missing . Nobody had told him how many there were .\n"
            "So he went down .\n",
        ),
        ("The <unk> , well @-@ known , slept . \n \n So \n", None),
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_a_plain_file_is_one_article_whatever_the_split(
    text: str, converted: str | None, split: str, tmp_path: Path
) -> None:
    path = tmp_path / "My test.txt"
    path.write_bytes(text.encode())
    corpus = open_corpus(str(path), whole=True)
    (article,) = corpus.articles(split)
    assert article.title == "My test"
    if converted is None:  # in WikiText form without titles: the words and lines as they stand
        assert article.text.split() == text.split()
        assert count_words(article.text) == count_words(text)
    else:
        assert article == Article("My test", converted)


def test_a_plain_file_is_too_little_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time.")
    for split in SPLITS:
        with pytest.raises(UserError) as caught:
            open_corpus(str(path)).articles(split)
        for words in (str(path), "one article", "3 or more", "' = Title = '", "evaluate"):
            assert words in str(caught.value)


@pytest.mark.parametrize("name", ["story.txt", "story.md", "STORY.TXT", "story", "story.text"])
def test_endings_do_not_matter_to_one_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Once upon a time.")
    (article,) = open_corpus(str(tmp_path / name), whole=True).articles("valid")
    assert article.text == "Once upon a time .\n"


def test_packed_plain_files(tmp_path: Path) -> None:
    path = tmp_path / "story.txt.gz"
    path.write_bytes(gzip.compress("It’s late.".encode()))
    assert list(open_corpus(str(path), whole=True).articles("test")) == [
        Article("story", "It 's late .\n")
    ]


def test_invalid_utf8_in_a_plain_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_bytes(b"One.\nTwo caf\xe9.\n")
    with pytest.raises(UserError, match="line 2: not valid UTF-8"):
        list(open_corpus(str(path), whole=True).articles("valid"))


def test_a_directory_of_plain_files_is_divided_by_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "stories", 25)
    (folder / "notes.rst").write_text("no text")
    (folder / ".hidden.txt").write_text("no text")
    corpus = open_corpus(str(folder))
    parts = [titles(corpus, split) for split in SPLITS]
    assert [len(part) for part in parts] == [21, 2, 2]
    assert list(itertools.chain(*parts)) == [f"story {number:02}" for number in range(25)]
    assert len({corpus.fingerprint(split) for split in SPLITS}) == 3
    whole = open_corpus(str(folder), whole=True)
    assert titles(whole, "valid") == titles(whole, "test") == list(itertools.chain(*parts))


def test_a_directory_of_too_few_plain_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "stories", 2)
    with pytest.raises(UserError, match="holds 2 plain text"):
        open_corpus(str(folder)).articles("train")
    assert len(titles(open_corpus(str(folder), whole=True), "valid")) == 2


def test_plain_files_may_hold_titles_or_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "stories", 2)
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "late.txt").write_text(TITLED)
    (folder / "void.md").write_text("")
    corpus = open_corpus(str(folder), whole=True)
    assert titles(corpus, "valid") == ["One", "Two", "story 00", "story 01"]


def test_a_split_in_one_name_makes_no_splits_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "stories", 3)
    (folder / "speed test.txt").write_text("Fast.")
    assert len(titles(open_corpus(str(folder), whole=True), "valid")) == 4


@pytest.mark.parametrize("names", [("train.txt", "valid.txt", "test.txt"), ("train.tokens",)])
def test_files_named_as_splits_need_titles(names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("About the text.")
    for name in names:
        (tmp_path / name).write_text("no title here")
    with pytest.raises(UserError, match="no title line"):
        list(open_corpus(str(tmp_path)).articles("train"))


def test_a_file_with_titles_is_scored_whole(tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    path.write_text(TITLED)
    whole = open_corpus(str(path), whole=True)
    assert [titles(whole, split) for split in SPLITS] == [["One", "Two"]] * 3
    assert len({whole.fingerprint(split) for split in SPLITS}) == 1
    with pytest.raises(UserError, match="holds 2 article"):
        list(open_corpus(str(path)).articles("valid"))
    named = tmp_path / "test.txt"
    named.write_text(TITLED)
    with pytest.raises(UserError, match="is a test split by its name"):
        open_corpus(str(named), whole=True).articles("valid")


def test_fingerprints_follow_names_and_content(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "stories", 3)
    found = {open_corpus(str(folder)).fingerprint("test")}
    (folder / "story 02.txt").write_text("It's story number 7.\n")
    found.add(open_corpus(str(folder)).fingerprint("test"))
    (folder / "story 02.txt").rename(folder / "story 03.txt")
    found.add(open_corpus(str(folder)).fingerprint("test"))
    assert len(found) == 3


def test_results_are_named_by_content(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "story.txt", tmp_path / "b" / "story.txt"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"Story of {path.parent.name}.")
    one, two = (results_name(str(path)) for path in paths)
    assert one != two
    for name in (one, two):
        assert name.startswith("on-story-")
        assert len(name) == len("on-story-") + 8
    paths[1].write_text("Story of a.")
    assert results_name(str(paths[1])) == one
    assert results_name("pydocs") == "on-pydocs"
    assert results_name("wikitext-2") == "on-wikitext-2"


def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("A  “well-known”, 1,000-year-old end…\n\n\nIt’s so.", encoding="utf-8")
    source = open_corpus(str(path), whole=True)
    size = len(b'A "well-known", 1,000-year-old end...\nIt\'s so.\n')
    assert [article.canonical_bytes for article in source.articles("valid")] == [size]
    articles = [*source.articles("valid"), Article("One", "a b\n")]
    vocabulary = fit_vocabulary(articles, "word", 0)
    ((_, encoded),) = encode_articles(articles, vocabulary, tmp_path)
    assert encoded.bytes == [size, 4]
