"""Corpora -> articles: one interface over the built-in text, WikiText from the hub, local files.

Local files may be in WikiText's form or in natural spelling, which is converted to it.

A corpus is opened by name or path (`open_corpus`) and streams its articles in order, split by
split; no split is ever held in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mlm.base.errors import UserError, command_of
from mlm.base.files import readable
from mlm.spelling import WordFeed, guess_form
from mlm.text.articles import (
    LONGEST_ARTICLE,
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
    too_long,
)
from mlm.text.hub import HUB_CONFIGS, HubCorpus, ParquetDirectory, parquet_directory
from mlm.text.lines import PACKINGS, read_lines

__all__ = [
    "SPLITS",
    "Article",
    "Corpus",
    "count_words",
    "open_corpus",
    "results_name",
    "split_articles",
    "title_of",
]


NAMED = ("pydocs", *HUB_CONFIGS)
"""Corpora that are known by name."""


_FORMS = (".txt", ".tokens", ".raw")
_PLAIN = (".txt", ".md")
_TITLES = "title lines such as ' = Title = ', with a blank line before and after each"
_CONVERSION = 1  # counts up when the same text is converted to other words


def open_corpus(name: str, whole: bool = False) -> Corpus:
    """Open a corpus by its name or path.

    `pydocs`, the built-in text; `wikitext-2`, `wikitext-103`, `wikitext-2-raw`,
    `wikitext-103-raw`, from the hub or its local cache; otherwise a path: a directory in the hub's
    layout (`DIR/wikitext-2-v1/train-*.parquet`), a directory of files in WikiText form whose names
    hold `train`, `valid`, `test` (`.txt .tokens .raw`, also `.xz .gz .zst`), or one such file. A
    file whose name holds a split is that split; any other file is divided (`SingleFile`). Any
    other file, and a directory of others, is plain text (`PlainFiles`). A known name wins over a
    path: write `./wikitext-2` for a directory of that name.

    whole: as a text to score, not to train on. One file without a split in its name, a plain file
    and a directory of plain files are not divided: all of their articles are in every split.

    Raises `UserError` if there is no such corpus.
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
        first = _first_line(path)
        plain = first and title_of(first) is None
        return PlainFiles(path, whole) if plain else SingleFile(path, whole)
    tables = parquet_directory(path)
    if tables is not None:
        return ParquetDirectory(tables)
    directory = _text_directory(path)
    return TextDirectory(directory) if directory else PlainFiles(path, whole)


def results_name(name: str) -> str:
    """Name of the folder of results on a corpus, relative to the run's: `on-story-1a2b3c4d`.

    The digits are a hash of the content, so that two files of one name have a folder each; a known
    name has none.
    """
    if name == "pydocs" or name in HUB_CONFIGS:
        return f"on-{name}"
    corpus, digest = open_corpus(name, whole=True), hashlib.sha256()
    for split in SPLITS:
        with contextlib.suppress(UserError):  # it may lack a split
            digest.update(corpus.fingerprint(split).encode())
    return f"on-{corpus.name}-{digest.hexdigest()[:8]}"


def _first_line(path: Path) -> str:
    """The first line with text, "" if there is none."""
    with contextlib.closing(read_lines(path)) as lines:
        return next((line for line in lines if line.strip()), "")


def _has_titles(path: Path) -> bool:
    """Whether a file is in WikiText form: its first line with text is a title."""
    return title_of(_first_line(path)) is not None


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


def _text_files(directory: Path) -> list[Path]:
    """Files of plain text in a directory, in the order of their names."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file()]
    return [path for path in files if _stem(path) is not None and path.name[0] != "."]


def _stem(path: Path) -> str | None:
    """Name of a plain file without its endings, None if these are of no plain file."""
    name = path.name
    packing = next((p for p in PACKINGS if name.lower().endswith(p)), "")
    name = name[: len(name) - len(packing)]
    form = next((f for f in _PLAIN if name.lower().endswith(f)), None)
    return None if form is None else name[: -len(form)]


def _text_directory(directory: Path) -> Path | None:
    """The directory with one file in WikiText form per split; None if its files are plain.

    That is `directory`, or its one subdirectory with a training file if it holds no split itself.
    """
    splits, plain = _split_files(directory), _text_files(directory)
    named = [path for paths in splits.values() for path in paths]
    # A name such as `speed test.txt` among plain files does not make a split.
    clear = all(splits.values()) or set(plain) <= set(named) or not set(named) <= set(plain)
    if named and (clear or any(map(_has_titles, named))):
        return directory
    inner = [path for path in sorted(directory.iterdir()) if path.is_dir()]
    training = [path for path in inner if _split_files(path)["train"]]
    if len(training) == 1:
        return training[0]
    if plain:
        return None
    hint = f" Its subdirectories {', '.join(p.name for p in training)} do." if training else ""
    raise UserError(
        f"directory {directory} holds no text: no file that ends in {', '.join(_PLAIN)}, none in "
        f"WikiText form whose name holds train, valid or test and ends in {', '.join(_FORMS)} (or "
        f"that and {', '.join(PACKINGS)}), and no parquet files in the hub's layout.{hint} Name "
        "the directory that holds them"
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


def _divided(count: int) -> dict[str, tuple[int, int]]:
    """Split -> its first and one past its last of `count` articles or files: see `SingleFile`."""
    held_out = max(1, count // 10)
    valid, test = count - 2 * held_out, count - held_out
    return {"train": (0, valid), "valid": (valid, test), "test": (test, count)}


class SingleFile:
    """One file in WikiText form.

    If its name holds a split (`wiki.valid.tokens`) it is that split and no other. Otherwise its
    articles are divided in file order: the last tenth is test, the tenth before it valid (at least
    one article each), the rest train. If it is `whole` it is not divided.
    """

    def __init__(self, path: Path, whole: bool = False) -> None:
        self.path = path
        self.only = _split_in_name(path)
        self.whole = whole and self.only is None
        self.name = safe_name(path.name.split(".")[0])

    @cached_property
    def _parts(self) -> dict[str, tuple[int, int]]:
        count = sum(1 for _ in split_articles(read_lines(self.path), str(self.path)))
        if count < 3:
            raise UserError(
                f"{self.path} holds {count} article(s), too few to divide into train, valid and "
                "test. Give a file with more, or a directory with one file per split"
            )
        return _divided(count)

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
        if self.only is not None or self.whole:
            yield from articles
            return
        low, high = self._parts[split]
        yield from itertools.islice(articles, low, high)

    def fingerprint(self, split: str) -> str:
        check_split(split)
        return f"{file_hash(self.path)}-{'whole' if self.whole else self.only or split}"


class PlainFiles:
    """Text in natural spelling: one file, or the files of a directory in the order of their names.

    A file is one article, its title the file's name; the title is not read. The text is converted
    to WikiText's form (`mlm.spelling`) from the form that its start suggests. A file that opens
    with a title line is in WikiText form already, and gives its articles. Files without a word give
    none. The files are divided as a `SingleFile` divides its articles, unless they are `whole`.
    """

    def __init__(self, path: Path, whole: bool = False) -> None:
        self.path = path
        self.whole = whole
        self.name = safe_name(path.resolve().name.split(".")[0])

    def _files(self, split: str) -> list[Path]:
        """The files of a split; `UserError` if there are too few to divide."""
        check_split(split)
        if self.path.is_file():
            files, what = [self.path], "is one plain text, one article"
        else:
            files = _text_files(self.path)
            what = f"holds {len(files)} plain text(s), one article each"
        if self.whole:
            return files
        if len(files) < 3:
            raise UserError(
                f"{self.path} {what}: too few to divide into train, valid and test. To train, give "
                f"a directory with 3 or more such files, or text in WikiText form, with {_TITLES}; "
                f"`{command_of('evaluate')}` scores any text"
            )
        low, high = _divided(len(files))[split]
        return files[low:high]

    def articles(self, split: str) -> Iterator[Article]:
        return itertools.chain.from_iterable(map(self._articles, self._files(split)))

    def _articles(self, path: Path) -> Iterator[Article]:
        if path != self.path and _has_titles(path):
            return split_articles(read_lines(path), str(path))
        title = path.name if _stem(path) is None else str(_stem(path))
        article = _converted(readable(title), _whole(path))
        return iter([article] if article.text.strip() else [])

    def fingerprint(self, split: str) -> str:
        digest = hashlib.sha256()
        for path in self._files(split):
            digest.update(f"{readable(path.name)} {file_hash(path)}\n".encode())
        return f"plain-{_CONVERSION}-{digest.hexdigest()}"


def _whole(path: Path) -> str:
    """The text of a plain file.

    Raises:
        UserError: it is longer than an article may be.
    """
    lines, size = [], 0
    for line in read_lines(path):
        lines.append(line)
        size += len(line)
        if size > LONGEST_ARTICLE:
            raise too_long(str(path), path.name)
    return "".join(lines)


def _converted(title: str, text: str) -> Article:
    """Natural spelling in WikiText's form: words between spaces, a newline after every line."""
    feed = WordFeed(guess_form(text))
    lines: list[list[str]] = [[]]
    for word in itertools.chain(feed.read(text), feed.finish()):
        if word.line_end:
            lines.append([])
        else:
            lines[-1] += word.forms
    added = bool(lines[-1])  # the end of the last line
    if not added:
        del lines[-1]
    article = "".join(" ".join(line) + "\n" for line in lines)
    return Article(title, article, feed.canonical_bytes + added)


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
