"""Atomic files: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlm.base.processes import ranks

MARK = ".unfinished."
"""In the names of temporary files."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; rename it onto `path` if the block succeeds.

    On any exception (a full disk, Ctrl-C) the temporary file is removed and `path` is untouched.
    What is killed leaves it (`leftovers`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}{MARK}", suffix=path.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that writers which were killed left in a folder, or one or two below it."""
    name = f".*{MARK}*"
    return [file for below in ("", "*/", "*/*/") for file in folder.glob(below + name)]


def _umask() -> int:
    """The permissions that new files of this process lack (`mkstemp` asks for fewer still)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)  # elsewhere it can only be read by setting it
    os.umask(mask)
    return mask


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Tell which file it was when a write fails: the system says so only when opening fails."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically; of several processes the first does."""

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    ranks().on_first(write)


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text in UTF-8 spells.

    Raises:
        ValueError: it is none, is no UTF-8, or is nested too deeply to be read.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def readable(name: str) -> str:
    """A file's name as UTF-8 can hold it: bytes of it that are no text become a sign for that."""
    return os.fsencode(name).decode("utf-8", "replace")
