"""A file, plain or compressed, -> its lines of text, or one clear message about what ails it."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from mlm.base.errors import UserError

PACKINGS = (".xz", ".gz", ".zst")
LONGEST_LINE = 1 << 24
"""Bytes of a line, unpacked: no more than one is in memory at once."""


def _raw_lines(path: Path) -> Generator[bytes, None, None]:
    """Lines of a plain or compressed file as bytes; `UserError` if it is damaged."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".xz":
            with lzma.open(path, "rb") as file:
                yield from _lines_of(file)
        elif suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield from _lines_of(file)
        elif suffix == ".zst":
            with io.BufferedReader(_ZstdStream(path), 1 << 20) as file:
                yield from _lines_of(file)
        else:
            with open(path, "rb", buffering=1 << 20) as file:
                yield from _lines_of(file)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}): it cannot be unpacked to its end. "
            "Fetch or pack it again"
        ) from None


def _lines_of(file: Any) -> Iterator[bytes]:
    """Lines of an open file; of one that is too long the first `LONGEST_LINE` bytes and one."""
    return iter(lambda: file.readline(LONGEST_LINE + 1), b"")


class _ZstdStream(io.RawIOBase):
    """Raw stream of a .zst file that, unlike the package's own reader, notices a cut-off frame."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file = open(path, "rb")  # noqa: SIM115 (closed in close())
        self._frame: Any = None
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            packed = self._file.read(1 << 10)  # four bytes may stand for 128 KB
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            unpacked = []
            try:
                while packed:
                    self._frame = self._frame or self._new()
                    unpacked.append(self._frame.decompress(packed))
                    packed = self._frame.unused_data if self._frame.eof else b""
                    self._frame = None if self._frame.eof else self._frame
            except self._error as error:
                raise EOFError(str(error)) from None
            self._rest = memoryview(b"".join(unpacked))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def read_lines(path: Path) -> Generator[str, None, None]:
    """Lines of a UTF-8 file, plain or `.xz .gz .zst`, each with its newline.

    Lines end at `\\n` only, as in WikiText. Raises `UserError` for a missing or damaged file, and
    with the line's number for invalid UTF-8 and for a line of more than `LONGEST_LINE` bytes.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; check the path given as the corpus")
    # A generator abandoned half-way must still close its file: hence the explicit closing().
    with contextlib.closing(_raw_lines(path)) as lines:
        for number, line in enumerate(lines, 1):
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes, so this is no "
                    "text, or one without line ends. Break it into lines, for example with fold -s"
                )
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid UTF-8 (byte {error.start}: {error.reason}). "
                    "Convert the file, for example with iconv -f latin1 -t utf-8"
                ) from None
