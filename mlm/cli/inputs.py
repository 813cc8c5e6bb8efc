"""Texts named on a command line -> documents, checked to their end before anything long begins."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm.base.errors import UserError
from mlm.spelling import guess_form
from mlm.text.lines import read_lines

if TYPE_CHECKING:
    from mlm.reader.model import Form

STDIN = "-"
"""The name of standard input on the command line."""

CHUNK = 1 << 16
"""Characters that are handed on at once."""

MOST_OF_STDIN = 1 << 28
"""Bytes of standard input, which is held in memory."""

_GUESSED = 1 << 16  # characters from which the form of a text is guessed


_MARKDOWN = (".md", ".markdown")


@dataclass(frozen=True)
class Source:
    """A text that was read once and found sound: its name, form and size."""

    name: str
    """As messages call it."""
    form: Form
    """How it is written."""
    size: int
    """UTF-8 bytes, unpacked."""
    documents: int
    path: Path | None
    """None: `text` was standard input."""
    text: str = ""
    split_on: re.Pattern[str] | None = None

    def read(self) -> Iterator[Iterator[str]]:
        """The documents one after the other, each in pieces that must be taken in turn."""
        lines = _lines(self.text) if self.path is None else read_lines(self.path)
        count = 0

        def number(piece: tuple[bool, str]) -> int:
            nonlocal count
            count += piece[0]
            return count

        for _, pieces in itertools.groupby(_chunks(lines, self.split_on), number):
            yield (chunk for _, chunk in pieces)


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern of --split-on.

    Raises:
        UserError: it is no regular expression.
    """
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--split-on {pattern}: not a regular expression ({error}); check it"
        ) from None


def open_sources(
    names: Sequence[str], form: str = "auto", split_on: re.Pattern[str] | None = None
) -> list[Source]:
    """The texts of these names, `-` or none for standard input, each read to its end.

    Raises:
        UserError: a text is missing, damaged, binary, no UTF-8 or without a word.
    """
    chosen = list(names) or [STDIN]
    if chosen.count(STDIN) > 1:
        raise UserError("standard input (-) can be read only once; name it once")
    return [
        _standard_input(form, split_on) if n == STDIN else _file(n, form, split_on) for n in chosen
    ]


def _file(name: str, form: str, split_on: re.Pattern[str] | None) -> Source:
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{name} is a folder; name the text files in it, such as {name}/*.txt")
    if not path.exists():
        raise UserError(f"no file {name}; check the path, or use - for standard input")
    return _checked(name, path, read_lines(path), form, split_on)


def _standard_input(form: str, split_on: re.Pattern[str] | None) -> Source:
    """Standard input, held in memory: it can be read only once, and is checked first."""
    if sys.stdin is None:
        raise UserError("there is no standard input here; name a text file")
    if sys.stdin.isatty():
        print("reading standard input; end it with Ctrl-D", file=sys.stderr, flush=True)
    data = sys.stdin.buffer.read(MOST_OF_STDIN + 1)
    if len(data) > MOST_OF_STDIN:
        raise UserError(
            f"standard input holds more than {MOST_OF_STDIN:,} bytes; give the text as a file"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start) - 1
        raise UserError(
            f"standard input, line {line}: not valid UTF-8 (byte {byte}: {error.reason}). "
            "Convert it, for example with iconv -f latin1 -t utf-8"
        ) from None
    found = _checked("standard input", None, _lines(text), form, split_on)
    return dataclasses.replace(found, text=text)


def _lines(text: str) -> Iterable[str]:
    """Lines end at `\\n` only, as in files."""
    return io.StringIO(text, newline="\n")


def _checked(
    name: str,
    path: Path | None,
    lines: Iterable[str],
    form: str,
    split_on: re.Pattern[str] | None,
) -> Source:
    """The source of these lines, read to their end."""
    size, documents, number, words = 0, 0, 1, False
    start: list[str] = []
    for begins, chunk in _chunks(lines, split_on):
        at = chunk.find("\0")
        if at >= 0:
            line = number + chunk.count("\n", 0, at)
            raise UserError(
                f"{name}, line {line}: a zero byte, so this is a binary file or UTF-16. Give a "
                "text file, or convert it, for example with iconv -f utf-16 -t utf-8"
            )
        if sum(map(len, start)) < _GUESSED:
            start.append(chunk)
        size += len(chunk.encode())
        number += chunk.count("\n")
        documents += begins
        words = words or not chunk.isspace()
    if not words:
        raise UserError(f"{name} has no word in it; nothing to read")
    return Source(name, _form(path, form, "".join(start)), size, documents, path, "", split_on)


def _form(path: Path | None, form: str, start: str) -> Any:
    """The form asked for; `auto` goes by the file's name, then by how the text begins."""
    if form != "auto":
        return form
    if path is not None and path.suffix.lower() in _MARKDOWN:
        return "markdown"
    return guess_form(start)


def _chunks(lines: Iterable[str], split_on: re.Pattern[str] | None) -> Iterator[tuple[bool, str]]:
    """Lines put together to pieces of about `CHUNK` characters, and whether each begins a document.

    A line in which `split_on` is found begins a document; blank text before the first such line
    belongs to the document that follows.
    """
    pending: list[str] = []
    length, begins, blank = 0, True, True
    for line in lines:
        border = split_on is not None and not blank and split_on.search(line.rstrip("\r\n"))
        if border or length >= CHUNK:
            if pending:
                yield begins, "".join(pending)
            begins, blank = bool(border), blank or bool(border)
            pending, length = [], 0
        for at in range(0, len(line), CHUNK):
            if length >= CHUNK:
                yield begins, "".join(pending)
                pending, length, begins = [], 0, False
            pending.append(line[at : at + CHUNK])
            length += len(pending[-1])
        blank = blank and line.isspace()
    if pending:
        yield begins, "".join(pending)
