"""What does a neighbour cost that takes one of the cores?

    python -m benchmarks.busy --size S

Adapting while scoring (RMS, all LSTM weights of every lane), with the compiled kernels and with
tensor operations only, each alone and beside processes that never rest, one per core taken. A
machine of C cores with k taken has at best (C - k/2)/C of its speed left: the scheduler halves the
cores that are shared. Prints a table and writes it to <out>/busy_SIZE.json.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.ceiling import Options as Ceiling
from benchmarks.ceiling import adapting
from benchmarks.output import HOME
from benchmarks.timing import SIZES, Work, ratio, record, side_by_side, speed, threads
from mlm import kernels
from mlm.base.errors import run_cli
from mlm.models.recurrent import RecurrentLM

SPIN = "while True: pass"


@dataclass(frozen=True)
class Options:
    """Adapting on a busy machine."""

    size: Literal["S", "M"] = "S"
    """Sizes of the model: S = 1 x 256, M = 2 x 650."""
    rounds: int = 5
    """Times that every row has its turn."""
    lanes: int = 16
    """B: articles side by side."""
    segment: int = 20
    """M: tokens per update."""
    updates: int = 8
    """Segments per turn."""
    taken: int = 1
    """Cores taken by others."""
    out: Path = HOME / "busy"
    """Folder of busy_SIZE.json."""


@contextlib.contextmanager
def neighbours(number: int) -> Iterator[None]:
    """So many processes that never rest, while inside."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(number)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def _work(work: Work, number: int, compiled: bool, taken: int) -> Work:
    def run() -> int:
        eager = contextlib.nullcontext() if compiled else kernels.eager()
        with threads(number), eager, neighbours(taken):
            return work()

    return run


def compare(shape: RecurrentLM, options: Options) -> list[dict[str, Any]]:
    """Rows of the table."""
    base = Ceiling(lanes=options.lanes, updates=options.updates, device="cpu")
    work = adapting(shape, base, options.segment, learned=False)
    keys = [
        (compiled, number)
        for compiled in ((True, False) if kernels.numba is not None else (False,))
        for number in sorted({1, torch.get_num_threads()})
    ]
    todo = {
        f"{compiled} {number} {taken}": _work(work, number, compiled, taken)
        for compiled, number in keys
        for taken in (0, options.taken)
    }
    seconds = side_by_side(todo, options.rounds)
    rows = []
    for compiled, number in keys:
        alone, beside = (seconds[f"{compiled} {number} {k}"] for k in (0, options.taken))
        rows.append(
            {
                "engine": "compiled" if compiled else "eager",
                "threads": number,
                "tokens/s alone": speed(alone),
                f"tokens/s, {options.taken} core taken": speed(beside),
                "slower": ratio(beside, alone),
            }
        )
    return rows


def main() -> None:
    """Measure, print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    record(f"busy_{options.size}", compare(SIZES[options.size], options), options)


if __name__ == "__main__":
    run_cli(main)
