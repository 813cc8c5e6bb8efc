"""Lines of files: what is read comes in bounded memory, whatever a packed file unpacks to."""

from __future__ import annotations

import gzip
import itertools
import lzma
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from mlm.base.errors import UserError
from mlm.text import articles, lines
from mlm.text.articles import split_articles
from mlm.text.corpora import open_corpus
from mlm.text.lines import read_lines

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("packing", PACK)
def test_a_line_of_any_length_is_refused_in_bounded_memory(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"long.txt{packing}"
    path.write_bytes(PACK[packing](b"a line\n" + bytes([97]) * (100 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"line 2: longer than 16,777,216 bytes"):
            list(read_lines(path))
        assert tracemalloc.get_traced_memory()[1] < 80 << 20  # of 100 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packing", PACK)
def test_lines_up_to_the_limit_are_read_whole(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 10)
    path = tmp_path / f"lines.txt{packing}"
    path.write_bytes(PACK[packing](b"nine bytes"[:9] + b"\n" + b"x" * 10))
    assert list(read_lines(path)) == ["nine byte\n", "x" * 10]
    path.write_bytes(PACK[packing](b"x" * 10 + b"\n"))
    with pytest.raises(UserError, match="line 1: longer than 10 bytes"):
        list(read_lines(path))


def test_an_article_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(articles, "LONGEST_ARTICLE", 1000)

    def endless() -> Iterator[str]:
        yield from [" = First = \n", "\n", "short\n", "\n", " = Second = \n", "\n"]
        yield from itertools.repeat("and so on\n")

    found = split_articles(endless(), "some.txt")
    assert next(found).title == "First"
    with pytest.raises(UserError, match=r"some.txt: the article 'Second' is longer than 1,000"):
        next(found)


def test_a_plain_file_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlm.text.corpora.LONGEST_ARTICLE", 1000)
    path = tmp_path / "story.txt.gz"
    path.write_bytes(gzip.compress(b"and so on\n" * 101))
    with pytest.raises(UserError, match=r"the article 'story.txt.gz' is longer than"):
        list(open_corpus(str(path), whole=True).articles("valid"))
