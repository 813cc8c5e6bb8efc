"""What an article, a word and a corpus are: the one place where WikiText's form is defined."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlm.base.errors import UserError

SPLITS = ("train", "valid", "test")


# How names of files and of data sets call the splits.
SPLIT_WORDS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}


LONGEST_ARTICLE = 1 << 26
"""Characters of an article, which is held in memory whole: some ten million words."""
_FORM_HELP = (
    "WikiText form: each article opens with a line ' = Title = ' (one '=' on each side) that has "
    "a blank line before and after it"
)


@dataclass(frozen=True)
class Article:
    """One article: its title and all of its lines, title line included, each ended by a newline."""

    title: str
    text: str
    canonical_bytes: int | None = field(default=None, compare=False)
    """UTF-8 bytes of natural spelling that was converted to `text`; None if none was."""


class Corpus(Protocol):
    """A source of articles in three splits: "train", "valid", "test"."""

    @property
    def name(self) -> str:
        """A short name, safe in file names: "pydocs", "wikitext-2", a directory's name."""
        ...

    def articles(self, split: str) -> Iterator[Article]:
        """Stream the articles of `split` in order; `UserError` if it is missing or malformed."""
        ...

    def fingerprint(self, split: str) -> str:
        """A hash that changes when the content of `split` changes."""
        ...


def count_words(text: str) -> int:
    """Number of words in `text` as published WikiText perplexities count them.

    Every whitespace-separated word is one, and so is the end (`<eos>`) of every line, blank lines
    included: 217,646 in WikiText's validation split.
    """
    lines = text.count("\n") + (text != "" and not text.endswith("\n"))
    return len(text.split()) + lines


def title_of(line: str) -> str | None:
    """Title in a line ` = Title = ` (exactly one `=` on each side), else None.

    Whether the line really opens an article depends on its neighbours: see `split_articles`.
    """
    words = line.split()
    if len(words) < 3 or words[0] != "=" or words[-1] != "=":
        return None
    if words[1] == "=" or words[-2] == "=":
        return None
    return " ".join(words[1:-1])


def too_long(source: str, title: str) -> UserError:
    """What to say of an article of more than `LONGEST_ARTICLE` characters."""
    return UserError(
        f"{source}: the article {title[:40]!r} is longer than {LONGEST_ARTICLE:,} characters. "
        "Divide it into several"
    )


def split_articles(lines: Iterable[str], source: str = "the text") -> Iterator[Article]:
    """Cut a stream of lines into articles, holding one article and one line at a time.

    An article opens at a title line (`title_of`) with a blank line or the start of the text before
    it and a blank line or the end of the text after it; ` = 5 = ` in running text opens nothing.
    The blank line before a title belongs to the article it opens, so every line belongs to exactly
    one article and word counts add up. Lines may come with or without their newline (files; rows
    of a data set). Raises `UserError`, naming `source`, if the text is empty, does not start
    with an article, or holds one that is too long (`LONGEST_ARTICLE`).
    """
    title: str | None = None
    pending: list[str] = []
    size = 0
    rows = (line.rstrip("\r\n") + "\n" for line in lines)
    line, number = next(rows, None), 0
    while line is not None:
        number += 1
        following = next(rows, None)
        found = title_of(line) if not pending or not pending[-1].strip() else None
        if found is not None and (following is None or not following.strip()):
            opening = pending if title is None else [pending.pop()] if pending else []
            if title is not None:
                yield Article(title, "".join(pending))
            title, pending, size = found, [*opening, line], 0
        elif title is None and line.strip():
            raise UserError(
                f"{source}, line {number}: no title line before the text {line.strip()[:40]!r}. "
                f"{_FORM_HELP}; add such a line at the start"
            )
        else:
            pending.append(line)
        size += len(line)
        if size > LONGEST_ARTICLE:
            raise too_long(source, title or "")
        line = following
    if title is None:
        raise UserError(f"{source} is empty: no article in it. {_FORM_HELP}")
    yield Article(title, "".join(pending))


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"{path.stat().st_size}-{digest.hexdigest()}"


def safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "text"


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
