"""What the speed benchmarks share: work timed side by side, worlds of random text, records.

A shared machine is busy now and then, so contestants take turns, round after round, and only
ratios within a round are compared. Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlm import kernels
from mlm.base.files import write_text
from mlm.models.base import AdaptationBase, choose_dynamic
from mlm.models.recurrent import RecurrentLM, initial_weights
from mlm.reading.step import begin, read
from mlm.rules.protocol import Bound
from mlm.store.run_folder import commit, machine
from mlm.text.streams import LaneStream, Segment

SIZES = {
    "S": RecurrentLM(4000, 256, 256, 1),
    "M": RecurrentLM(10_000, 650, 650, 2),
    "L": RecurrentLM(33_278, 400, 1150, 3),
}
"""S = this project on a CPU; M = the medium LSTM of Zaremba et al. 2014; L = AWD-LSTM."""
EOS = 0
BYTES = 4
"""Of a float32."""
PACKAGES = ("torch", "numpy", "numba", "higher", "torchopt")

Work = Callable[[], int]
"""Does a piece of work and returns how many tokens it processed."""
Step = Callable[[Segment], Tensor]
"""Reads the next segment of every lane and returns the losses (B, M); remembers where it is."""


# -- worlds ---------------------------------------------------------------------------------


class World(NamedTuple):
    """Everything a benchmark reads: no data and no trained model are needed."""

    base: AdaptationBase
    segments: list[Segment]
    """All lanes full, only the first opens articles."""


def random_articles(
    shape: RecurrentLM, number: int, tokens: int, seed: int = 0
) -> list[np.ndarray]:
    """Articles of random words, all equally long."""
    random = np.random.default_rng(seed)
    return list(random.integers(0, shape.vocabulary, size=(number, tokens)))


def world(
    size: RecurrentLM,
    segment: int,
    lanes: int,
    dynamic: str = "lstm",
    device: torch.device | str = "cpu",
    number: int = 9,
) -> World:
    """Random weights, a made-up Fisher (RMS of 1e-3 to 1e-2) and `number` segments of random text.

    Weights and Fisher depend on size and `dynamic` only.
    """
    generator = torch.Generator().manual_seed(0)
    weights = initial_weights(size, generator)
    names = choose_dynamic(weights, dynamic)
    rms = {n: 10 ** (torch.rand(weights[n].shape, generator=generator) - 3) for n in names}
    base = AdaptationBase(size, weights, names, rms, math.log(size.vocabulary), segment)
    device = torch.device(device)
    stream = LaneStream(random_articles(size, lanes, number * segment), lanes, segment, EOS)
    return World(base.to(device), [piece.to(device) for piece in stream])


def reading(base: AdaptationBase, rule: Bound, lanes: int) -> Step:
    """`mlm.reading.step.read` as scoring calls it: new weights go to one of two buffers in turn."""
    reader = begin(base, lanes)
    spare = [{n: torch.empty_like(w) for n, w in reader.weights.items()} for _ in range(2)]

    def step(segment: Segment) -> Tensor:
        nonlocal reader
        spare.reverse()
        reader, nll = read(base, rule, reader, segment, spare[0])
        return nll

    return step


# -- timing ---------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let PyTorch use so many CPU threads inside the block; 0 changes nothing."""
    before = torch.get_num_threads()
    if number and number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def clock() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def side_by_side(work: Mapping[str, Work], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds per token of every entry in every round.

    The entries take turns, so that a busy moment of the machine hits all of them. The first
    `warm_up` rounds are not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + rounds):
        for name, run in work.items():
            start = clock()
            tokens = run()
            seconds = clock() - start
            if turn >= warm_up:
                found[name].append(seconds / tokens)
    return found


def best_threads(
    work: Mapping[str, Work], rounds: int, number: int = 0
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per token of every entry with the number of threads that suits it best, and that.

    Small operations are slower on two threads than on one; nobody should lose by that. Tried are
    one and PyTorch's choice, or `number` alone if it is not 0.
    """
    counts = [number] if number else sorted({1, torch.get_num_threads()})

    def bound(run: Work, count: int) -> Work:
        def turn() -> int:
            with threads(count):
                return run()

        return turn

    todo = {f"{name} {n}": bound(run, n) for name, run in work.items() for n in counts}
    seconds = side_by_side(todo, rounds)
    used = {name: max(counts, key=lambda n: speed(seconds[f"{name} {n}"])) for name in work}
    return {name: seconds[f"{name} {n}"] for name, n in used.items()}, used


class Ratio(NamedTuple):
    """Ratio of two entries, round by round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Median, lowest and highest of the ratios of each round.

    Of seconds per token: how many times faster the denominator is.
    """
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def speed(seconds_per_token: Sequence[float]) -> float:
    """Tokens per second of the median round."""
    return 1 / statistics.median(seconds_per_token)


# -- the machine itself --------------------------------------------------------------------


class Machine(NamedTuple):
    """Best of several measurements with so many threads."""

    copy: float
    """Bytes per second read and written by a large copy."""
    cached: float
    """Bytes per second of one layer's recurrent weights, times a vector, over and over."""
    flops: float
    """Of a square float32 product, two per multiply-add."""
    bf16_flops: float


def _best(run: Any, amount: float, repeats: int = 7) -> float:
    """Amount per second of the fastest repeat."""
    run()
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return amount / min(seconds)


def _cached_speed(hidden: int, device: torch.device, times: int = 20) -> float:
    """Bytes per second of recurrent weights times a vector: the better of library and kernel.

    A GPU reads all lanes at once, a CPU a lane per thread, and each lane over and over.
    """
    gpu = device.type == "cuda"
    lanes = 16 if gpu else 1
    weights = torch.rand(lanes, hidden, 4 * hidden, device=device)
    h_B1H = torch.rand(lanes, 1, hidden, device=device)
    flat = weights.flatten()
    both = (lambda: torch.bmm(h_B1H, weights), lambda: torch.dot(flat, flat))

    def repeated(run: Any) -> Any:
        return lambda: [run() for _ in range(times)]

    found = [_best(repeated(run), times * BYTES * weights.numel()) for run in both]
    if not gpu and kernels.numba is not None:
        lanes = torch.get_num_threads()
        weights = torch.rand(lanes, 4 * hidden, hidden)
        x, out = torch.rand(lanes, hidden), torch.zeros(lanes, 4 * hidden)
        work, amount = 10 * weights.numel() * times, times * BYTES * weights.numel()
        task = (kernels.matrix_vector, lanes, work, weights, x, out, times)
        found.append(_best(lambda: kernels.share_out(*task), amount))
    return max(found)


def measure_machine(shape: RecurrentLM, device: torch.device, bf16: bool, small: bool) -> Machine:
    """Copy bandwidth, bandwidth of a lane's recurrent weights, matrix products.

    `small` is for tests.
    """
    gpu = device.type == "cuda"
    long = 1 << (16 if small else 28 if gpu else 26)
    side = 64 if small else 8192 if gpu else 1536
    source, target = torch.zeros(2, long, device=device)
    copy = _best(lambda: target.copy_(source), 2 * BYTES * long)
    cached = _cached_speed(max(h for _, h in shape.layer_sizes()), device)
    flops = [0.0, 0.0]
    for k, dtype in enumerate((torch.float32, torch.bfloat16)[: 1 + bf16]):
        a = torch.rand(side, side, device=device).to(dtype)
        flops[k] = _best(lambda a=a: a @ a, 2 * side**3)
    return Machine(copy, cached, *flops)


# -- records --------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what the figures depend on, of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Ratio):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows in columns, one per key; text to the left, numbers to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    width = [max(len(key), *(len(c[k]) for c in cells)) for k, key in enumerate(keys)]
    text = [all(isinstance(row.get(key), str | None) for row in rows) for key in keys]
    lines = []
    for line in [keys, *cells]:
        columns = zip(line, width, text, strict=True)
        lines.append("  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in columns))
    return "\n".join(line.rstrip() for line in lines)


def _named(setting: Any) -> Any:
    """A setting with names in the place of paths that only this machine has."""
    if isinstance(setting, (list, tuple)):
        return [_named(one) for one in setting]
    if not isinstance(setting, (str, Path)):
        return setting
    path = Path(setting)
    return path.name if path.is_absolute() or ".." in path.parts else setting


def record(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    options: Any,
    show: Sequence[str] | None = None,
    **more: Any,
) -> Path:
    """Print the table and write it, with machine and versions, to `<options.out>/<name>.json`.

    Args:
        options: a dataclass of settings with the folder `out`; of a path outside the working folder
            its name is written.
        show: columns to print; the file has all of them.
        more: further entries of the file.
    """
    print(table(rows if show is None else [{k: row.get(k) for k in show} for row in rows]))
    settings = {k: _named(v) for k, v in dataclasses.asdict(options).items() if k != "out"}
    plain = [
        {k: v._asdict() if isinstance(v, Ratio) else v for k, v in row.items()} for row in rows
    ]
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    found = {**about, "settings": settings, **more, "rows": plain}
    path = Path(options.out) / f"{name}.json"
    write_text(path, json.dumps(found, indent=1, default=str) + "\n")
    print(path)
    return path
