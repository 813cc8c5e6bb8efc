"""Articles that training never reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command

from benchmarks.unread import tuned_articles, unread, write_untuned
from mlm.base.errors import UserError
from mlm.text.corpora import count_words, open_corpus
from mlm.text.tokens import limited


def _corpus(folder: Path, words: list[int]) -> Path:
    folder.mkdir()
    articles = [f" \n = Article {k} = \n \n {'word ' * n}\n" for k, n in enumerate(words)]
    (folder / "train.txt").write_text("".join(articles), encoding="utf-8")
    return folder


def test_what_training_reads_and_the_rest_make_the_whole(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "text", [30, 5, 40, 20, 50])
    every = list(open_corpus(str(corpus)).articles("train"))
    for skip in (1, 60, 61, 100, 10_000):
        read = list(limited(iter(every), skip))
        assert [*read, *unread(str(corpus), skip)] == every
    assert list(unread(str(corpus), 0)) == every, "0 words were read, not all"
    long = list(unread(str(corpus), 60, longer=40))
    assert [a.title for a in long] == ["Article 2", "Article 4"]
    assert all(count_words(a.text) >= 40 for a in long)


def test_unread_articles_are_a_corpus(tmp_path: Path, command: Command) -> None:
    corpus, out = _corpus(tmp_path / "text", [30, 5, 40, 20, 50]), tmp_path / "long"
    done = command("benchmarks.unread", corpus, out, "--skip", 60, "--articles", 2)
    assert done.code == 0, done.err
    assert [a.title for a in open_corpus(str(out)).articles("test")] == ["Article 2", "Article 3"]
    done = command("benchmarks.unread", corpus, tmp_path / "none", "--skip", 60, "--longer", 99)
    assert done.code != 0
    assert "lower --longer or --skip" in done.error
    assert not (tmp_path / "none").exists()


def test_articles_that_tuning_does_not_read(tmp_path: Path) -> None:
    """What tuning reads (`as_text`) and the rest make the whole."""
    assert [tuned_articles([30, 5, 40], words) for words in (1, 30, 31, 35, 36, 99, 0)] == [
        1, 1, 2, 2, 3, 3, 3,
    ]  # fmt: skip
    corpus = _corpus(tmp_path / "text", [30, 5, 40, 20])
    (corpus / "train.txt").rename(corpus / "valid.txt")
    every = list(open_corpus(str(corpus)).articles("valid"))
    words = count_words(every[0].text) + 1
    write_untuned(str(corpus), words, tmp_path / "rest" / "test.txt")
    assert list(open_corpus(str(tmp_path / "rest")).articles("test")) == every[2:]
    with pytest.raises(UserError, match="no validation article is left behind the 9,999 words"):
        write_untuned(str(corpus), 9_999, tmp_path / "none" / "test.txt")
    assert not (tmp_path / "none").exists()
