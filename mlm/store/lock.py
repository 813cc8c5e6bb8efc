"""One writer at a time: who may write a run folder, and who does so now."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlm.base.errors import UserError
from mlm.base.files import leftovers, parse_json
from mlm.base.processes import ranks

LOCK = "lock"
"""The file that the one who writes holds locked; there only while somebody does."""

_HELD: set[Path] = set()
"""Folders that this process writes."""


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Write a folder alone: others are refused until the block is left or the process ends.

    Temporary files that a killed writer left are removed.

    Within the block the process may ask again. A folder that is made for it, and empty afterwards,
    is removed. Of several processes that compute together the first holds the lock for all.

    Raises:
        UserError: another process writes it, or nobody may; says who, or why.
    """
    place = folder.absolute()
    if place in _HELD:
        yield
        return
    check_writable(folder)
    held = ranks().on_first(lambda: _entered(folder, place))
    _HELD.add(place)
    try:
        for file in leftovers(place) if ranks().first else ():  # nobody else writes here now
            with contextlib.suppress(OSError):
                file.unlink()
        yield
    finally:
        _HELD.discard(place)
        if held is not None and ranks().first:
            _leave(place, *held)


def _entered(folder: Path, place: Path) -> tuple[list[Path], int]:
    """The folders that are made for it, and the open lock.

    Raises:
        UserError: another process holds it.
    """
    new = [p for p in (place, *place.parents) if not p.exists()]
    place.mkdir(parents=True, exist_ok=True)
    return new, _locked(folder, place / LOCK)


def _leave(place: Path, new: list[Path], handle: int) -> None:
    """Give the lock back; folders that are empty go."""
    (place / LOCK).unlink(missing_ok=True)  # while it is held: nobody else's is removed
    os.close(handle)
    with contextlib.suppress(OSError):  # something was written there
        for made in new:
            made.rmdir()


def _locked(folder: Path, path: Path) -> int:
    """The open lock of a folder, with this process as its holder.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix system: nothing to lock with
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 4096, 0)
            os.close(handle)
            raise UserError(
                f"{folder} is being written by {_spoken(holder)}. Wait until it ends, or choose "
                "another folder with --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # the one before removed it meanwhile
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    said = {"pid": os.getpid(), "host": platform.node(), "command": command[:2000]}
    said["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(said).encode(), 0)
    return handle


def _spoken(holder: bytes) -> str:
    """Who holds a lock, from what the file says."""
    try:
        said = parse_json(holder)
        return (
            f"process {said['pid']} on {said['host']} (`{said['command']}`, since {said['since']})"
        )
    except (ValueError, KeyError, TypeError):
        return "another process"


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made; a new one is not made.

    Raises:
        UserError: it is a file, or it must not be written.
    """
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not above.is_dir():
        raise UserError(f"--out {folder}: {above} is no folder; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(
            f"--out {folder}: {above} cannot be written ({error.strerror}); choose another folder"
        ) from None
