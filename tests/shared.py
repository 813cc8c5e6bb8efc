"""What a session makes once: the processes that share its tests take copies of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

#: Files of tests that take longest, the longest first: no process is left with one of them when
#: all others are done. The first two begin together: the second does without what is shared, which
#: the first makes meanwhile.
LONGEST = (
    "cli/test_bad_input.py",
    "report/test_plots.py",
    "reading/test_meta_gradient.py",
    "test_readme.py",
    "stages/test_several_processes.py",
    "stages/test_interruptions.py",
)


def longest_first(items: list[pytest.Item]) -> None:
    """Order tests by `LONGEST`, otherwise as they are."""
    here = Path(__file__).parent
    place = {here / name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def made_once(
    factory: pytest.TempPathFactory, worker: str, name: str, make: Callable[[Path], object]
) -> Path:
    """A new folder of this process with what `make(folder)` leaves in one.

    Of the processes of pytest-xdist the first one that asks calls `make`. What it left is copied,
    with its times, and where files name its place they then name that of the copy.

    Args:
        worker: the fixture `worker_id`: "master" where there is one process.
    """
    own = factory.mktemp(name)
    if worker == "master":
        make(own)
        return own
    common = factory.getbasetemp().parent / name
    made = common.with_name(f"{name}.made")
    with FileLock(common.with_name(f"{name}.lock")):
        if not made.exists():
            shutil.rmtree(common, ignore_errors=True)  # of one that failed
            common.mkdir()
            make(common)
            made.touch()
    shutil.copytree(common, own, dirs_exist_ok=True)
    for file in (path for path in own.rglob("*") if path.is_file()):
        _name_place(file, os.fsencode(common), os.fsencode(own))
    return own


def _name_place(file: Path, old: bytes, new: bytes) -> None:
    """Let a text name the place where it is; its times stay."""
    body = file.read_bytes()
    if old in body:
        body.decode("utf-8")  # of other files the length counts
        times = file.stat()
        file.write_bytes(body.replace(old, new))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
