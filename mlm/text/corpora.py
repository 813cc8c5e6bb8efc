"""Corpora -> articles: one interface over the built-in text, WikiText from the hub, local files.

A corpus is opened by name or path (`open_corpus`) and streams its articles in order, split by
split; no split is ever held in memory.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mlm.base.errors import UserError
from mlm.text.articles import (
    SPLIT_WORDS,
    SPLITS,
    Article,
    Corpus,
    check_split,
    count_words,
    file_hash,
    safe_name,
    split_articles,
    title_of,
)
from mlm.text.hub import HUB_CONFIGS, HubCorpus, ParquetDirectory, parquet_directory
from mlm.text.lines import PACKINGS, read_lines

__all__ = [
    "SPLITS",
    "Article",
    "Corpus",
    "count_words",
    "open_corpus",
    "split_articles",
    "title_of",
]


NAMED = ("pydocs", *HUB_CONFIGS)
"""Corpora that are known by name."""


_FORMS = (".txt", ".tokens", ".raw")


def open_corpus(name: str) -> Corpus:
    """Open a corpus by its name or path.

    `pydocs`, the built-in text; `wikitext-2`, `wikitext-103`, `wikitext-2-raw`,
    `wikitext-103-raw`, from the hub or its local cache; otherwise a path: a directory in the hub's
    layout (`DIR/wikitext-2-v1/train-*.parquet`), a directory of files in WikiText form whose names
    hold `train`, `valid`, `test` (`.txt .tokens .raw`, also `.xz .gz .zst`), or one such file. A
    file whose name holds a split is that split; any other file is divided (`SingleFile`). A known
    name wins over a path: write `./wikitext-2` for a directory of that name. Raises `UserError` if
    there is no such corpus.
    """
    if name == "pydocs":
        return PydocsCorpus()
    if name in HUB_CONFIGS:
        return HubCorpus(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"no corpus {name!r}: neither a file or directory of that path nor a known name. "
            f"Known names: {', '.join(NAMED)}"
        )
    if path.is_file():
        return SingleFile(path)
    tables = parquet_directory(path)
    if tables is not None:
        return ParquetDirectory(tables)
    return TextDirectory(_text_directory(path))


def _split_in_name(path: Path) -> str | None:
    """Split named by a text file in WikiText form, None if it is no such file."""
    name = path.name.lower()
    packing = next((p for p in PACKINGS if name.endswith(p)), "")
    name = name.removesuffix(packing)
    form = next((f for f in _FORMS if name.endswith(f)), None)
    if form is None:
        return None
    words = re.split(r"[^a-z]+", name.removesuffix(form))
    held = [split for split in SPLITS if any(w in words for w in SPLIT_WORDS[split])]
    return held[0] if len(held) == 1 else None


def _split_files(directory: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in sorted(directory.iterdir()):
        split = _split_in_name(path)
        if split and path.is_file():
            files[split].append(path)
    return files


def _text_directory(directory: Path) -> Path:
    """`directory`, or its one subdirectory with a training file if it holds no split itself."""
    if any(_split_files(directory).values()):
        return directory
    inner = [path for path in sorted(directory.iterdir()) if path.is_dir()]
    training = [path for path in inner if _split_files(path)["train"]]
    if len(training) == 1:
        return training[0]
    hint = f" Its subdirectories {', '.join(p.name for p in training)} do." if training else ""
    raise UserError(
        f"directory {directory} holds no text in WikiText form: no file whose name holds train, "
        f"valid or test and ends in {', '.join(_FORMS)} (or that and {', '.join(PACKINGS)}), "
        f"and no parquet files in the hub's layout.{hint} Name the directory that holds them"
    )


class TextDirectory:
    """A directory with one file in WikiText form per split."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = safe_name(directory.resolve().name)

    def path(self, split: str) -> Path:
        """The file of `split`; `UserError` if there is none or more than one."""
        check_split(split)
        found = _split_files(self.directory)[split]
        if not found:
            raise UserError(
                f"directory {self.directory} has no {split} split: looked for a file whose name "
                f"holds {split!r} and ends in {', '.join(_FORMS)} (or that and "
                f"{', '.join(PACKINGS)}). Add one, such as {split}.txt"
            )
        if len(found) > 1:
            raise UserError(
                f"directory {self.directory} has {len(found)} files for the {split} split: "
                f"{', '.join(p.name for p in found)}. Leave one of them there"
            )
        return found[0]

    def articles(self, split: str) -> Iterator[Article]:
        path = self.path(split)
        return split_articles(read_lines(path), str(path))

    def fingerprint(self, split: str) -> str:
        return file_hash(self.path(split))


class SingleFile:
    """One file in WikiText form.

    If its name holds a split (`wiki.valid.tokens`) it is that split and no other. Otherwise its
    articles are divided in file order: the last tenth is test, the tenth before it valid (at least
    one article each), the rest train.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.only = _split_in_name(path)
        self.name = safe_name(path.name.split(".")[0])

    @cached_property
    def _borders(self) -> tuple[int, int, int]:
        """Index of the first valid and first test article, and the number of articles."""
        count = sum(1 for _ in split_articles(read_lines(self.path), str(self.path)))
        if count < 3:
            raise UserError(
                f"{self.path} holds {count} article(s), too few to divide into train, valid and "
                "test. Give a file with more, or a directory with one file per split"
            )
        held_out = max(1, count // 10)
        return count - 2 * held_out, count - held_out, count

    def articles(self, split: str) -> Iterator[Article]:
        check_split(split)
        if self.only is not None and split != self.only:
            raise UserError(
                f"{self.path} is a {self.only} split by its name and has no {split} split. Give "
                f"the directory that holds both, {self.path.parent}"
            )
        return self._articles(split)

    def _articles(self, split: str) -> Iterator[Article]:
        articles = split_articles(read_lines(self.path), str(self.path))
        if self.only is not None:
            yield from articles
            return
        first_valid, first_test, count = self._borders
        low, high = {
            "train": (0, first_valid),
            "valid": (first_valid, first_test),
            "test": (first_test, count),
        }[split]
        yield from itertools.islice(articles, low, high)

    def fingerprint(self, split: str) -> str:
        check_split(split)
        return f"{file_hash(self.path)}-{self.only or split}"


class PydocsCorpus:
    """The documentation of the running Python, made on the spot (see `mlm.text.pydocs`)."""

    name = "pydocs"

    def articles(self, split: str) -> Iterator[Article]:
        from mlm.text import pydocs

        check_split(split)
        return split_articles(pydocs.lines(split), f"pydocs ({split})")

    def fingerprint(self, split: str) -> str:
        from mlm.text import pydocs

        check_split(split)
        return f"{pydocs.version()}-{split}"
