"""What a session makes once: the processes that share its tests take copies of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

#: Files of tests that come first, so that no process is left with a long one when all others are
#: done. The first makes what is shared; the next ones, which other processes begin with meanwhile,
#: do without that, and without kernels, which are compiled once for all on a new machine.
LONGEST = (
    "cli/test_bad_input.py",
    "report/test_plots.py",
    "test_package.py",
    "text/test_tokens.py",
    "reading/test_meta_gradient.py",
    "benchmarks/test_gpu_parts.py",
    "runs/test_run.py",
    "stages/test_several_processes.py",
    "stages/test_interruptions.py",
    "test_readme.py",
    "test_fuzz.py",
    "golden/test_golden.py",
    "settings/test_pairs.py",
    "reading/test_guard.py",
    "extensions/test_boundaries.py",
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
