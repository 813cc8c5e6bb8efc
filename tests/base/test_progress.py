"""Work is saved by the clock and when interrupted, and finished work is kept, too."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from mlm.base import progress
from mlm.base.progress import saved_by_the_clock


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_work_is_saved_by_the_clock_and_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved = [0.0], list[float]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def work() -> None:
        with saved_by_the_clock(lambda: saved.append(now[0]), 2.0) as tick:
            for second in range(0, 400, 50):
                now[0] = float(second)
                tick()
            now[0] = 399.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert saved == [150.0, 300.0, 399.0]


def test_an_error_saves_nothing() -> None:
    saved = []
    with pytest.raises(ValueError, match="mine"), saved_by_the_clock(lambda: saved.append(1), 1e9):
        raise ValueError("mine")
    assert saved == []


GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")


FAULTS = """
import resource
from mlm.base.progress import reuse_memory
reuse_memory()
for k in range(6):
    block = b"x" * 100_000_000
    del block
    if not k:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@GLIBC
def test_large_blocks_take_memory_that_others_left() -> None:
    """And not 24,000 new pages each; in a process of its own, which does nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 5000


@GLIBC
def test_saving_by_the_clock_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps between blocks that are in use, which the C library keeps otherwise."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with saved_by_the_clock(lambda: None, 1.0) as tick:
        blocks = [ctypes.create_string_buffer(b"x" * 65536) for _ in range(1000)]
        del blocks[:-1]  # the last holds the heap's end
        before = resident()
        now[0] = 100.0
        tick()
    assert resident() < before - 30e6
