"""The axis of unrolls for `growth`: time and peak memory of the meta-gradient in each mode.

Every (mode, T) has a fresh process, so that it gets memory from the system or from the engine's own
buffers as in a training of its own, and not as the other points left them.
Memory is counted, not modelled: `LiveBytes` sees every tensor an operation returns and when its
storage is freed, so the highest sum is exact for tensors; only scratch inside a single operation
escapes it. The resident peak of the process beside it (Linux) has that scratch too, but also what
the allocator keeps of freed blocks: it checks the count and is not the figure. Expected of T
updates, in bytes per lane with N dynamic weights:

    reverse     4 N 2 T           weights and gradients of every update
    checkpoint  4 N 2 sqrt(2 T)   snapshots, and the updates between two of them
    forward     4 N K             the K copies of the rule's tangent, whatever T

Beside these every mode holds a few copies that one step needs, however long the unroll.
Letters: B lanes, M tokens per segment, T updates of an unroll, N dynamic weights of a lane.
"""

from __future__ import annotations

import mlm  # noqa: F401

# isort: split
# The package comes before torch: it tells OpenMP not to spin, which others on the machine slow.
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ceiling import DECAY, RATE
from benchmarks.timing import BYTES, Work, clock, ratio, reading, side_by_side, world
from mlm.models.base import AdaptationBase
from mlm.models.recurrent import RecurrentLM
from mlm.reading.meta_gradient import GradientMode, meta_gradient
from mlm.reading.step import begin
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Bound, Parameters
from mlm.text.streams import Segment

AxisName = Literal["lanes", "hidden", "segment", "unroll", "vocabulary"]
MODES: tuple[GradientMode, ...] = get_args(GradientMode)


@dataclass(frozen=True)
class Place:
    """Where a point is measured."""

    shape: RecurrentLM
    lanes: int = 16
    segment: int = 20

    @property
    def weights(self) -> int:
        """N: the LSTM's weights, all of which adapt."""
        return sum(4 * h * (i + h + 1) for i, h in self.shape.layer_sizes())

    def moved(self, axis: AxisName, size: int) -> Place:
        """The same with another size on one axis; hidden and embedding size go together."""
        if axis in ("lanes", "segment"):
            return dataclasses.replace(self, **{axis: size})
        sizes = {"hidden": size, "embedding": size} if axis == "hidden" else {axis: size}
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, **sizes))


def exponent(sizes: Sequence[float], values: Sequence[Sequence[float]]) -> float:
    """Slope of log value against log size between the last two points.

    `values` holds every point's rounds; the ratio is taken within rounds.
    """
    growth = ratio(values[-1], values[-2]).median
    return math.log(growth) / math.log(sizes[-1] / sizes[-2])


# -- counting -------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one meta-gradient."""

    seconds: float | None
    """Per token, median of several; None: not timed."""
    live: int
    """Bytes of the tensors alive at once, at most."""
    resident: int | None
    """Bytes by which the resident peak of the process rose; None: the system does not tell."""


def _storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Of the tensors among an operation's arguments or results, lists of tensors included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _storages(value)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations inside the block made and that are still alive.

    Every storage counts once, whatever views it has, and not at all if it was there before the
    block. Kernels compiled apart from PyTorch write into tensors that PyTorch made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, then count what it made, not what it was given."""
        kwargs = kwargs or {}
        given = {id(storage) for storage in _storages((*args, *kwargs.values()))}
        out = func(*args, **kwargs)
        for storage in _storages((out,)):
            if id(storage) in self._known or id(storage) not in given:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def free(_: object) -> None:
            self.live -= self._known.pop(key)[1]

        alive, before = self._known.get(key) or (weakref.ref(storage, free), 0)
        self._known[key] = alive, size
        self.live += size - before  # it may have been made larger, as somebody's `out`
        self.peak = max(self.peak, self.live)


# -- an unroll ------------------------------------------------------------------------------

UNROLL = Place(RecurrentLM(1000, 128, 128, 1), lanes=4)
LENGTHS = (10, 40, 160, 640)
LONG, SHORT = 1000, 40
"""Unrolls whose memory is compared: long without reverse mode, short with it."""
READ = 1000
"""Updates of the article that `read` is timed on."""
REPEATED = 110
"""Updates timed per round: unrolls shorter than all rounds together are repeated."""


class Stamped(list[Segment]):
    """Segments that note when each of them was asked for, so when the one before was done."""

    stamps: list[float]

    def __iter__(self) -> Iterator[Segment]:
        """Start the notes anew."""
        self.stamps = []
        for segment in super().__iter__():
            self.stamps.append(clock())
            yield segment

    def ageing(self) -> float:
        """Median time of the last fifth of the segments over that of the first."""
        steps = [b - a for a, b in itertools.pairwise(self.stamps)]
        fifth = max(1, len(steps) // 5)
        return statistics.median(steps[-fifth:]) / statistics.median(steps[:fifth])


def _gates(base: AdaptationBase) -> tuple[Bound, Parameters]:
    """Three-level gates that start as Krause's rule."""
    rule = LinearGates()
    phi = rule.start_at_rms(base, RATE, DECAY)
    return rule.bind(phi, base), phi


def tangent_copies() -> int:
    """K of the three-level gates, which is the same for every model."""
    bound, _ = _gates(world(RecurrentLM(4, 2, 2, 1), 1, 1, number=1).base)
    return len(next(iter(bound.tangent(1).values())))


def unroll(mode: GradientMode, base: AdaptationBase, segments: Sequence[Segment]) -> Work:
    """One meta-gradient through all segments."""
    bound, phi = _gates(base)

    def work() -> int:
        reader = begin(base, len(segments[0].new))
        meta_gradient(base, bound, phi, reader, segments, mode)
        return sum(segment.targets.numel() for segment in segments[:])

    return work


def article(base: AdaptationBase, segments: Stamped) -> Work:
    """`read` with Krause's rule through all segments."""
    like = next(iter(base.rms.values()))
    numbers = {"rate": like.new_tensor(RATE), "decay": like.new_tensor(DECAY)}
    step = reading(base, RMS().bind(numbers, base), len(segments[0].new))
    return lambda: sum(step(segment).numel() for segment in segments)


# -- its memory -----------------------------------------------------------------------------


def formula(mode: GradientMode, updates: int, tangent: int) -> float:
    """Copies of the lanes' dynamic weights that an unroll should hold."""
    copies = {"reverse": 2.0 * updates, "checkpoint": 2 * math.sqrt(2 * updates)}
    return copies.get(mode, float(tangent))


def resident_peak() -> int | None:
    """Most bytes of this process that were in memory at once, where the system tells (Linux).

    Not `getrusage`: there the peak of a new process begins with that of the one it came from.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None


def probe(mode: GradientMode, updates: int, rounds: int, place: Place = UNROLL) -> Cost:
    """Peak memory and (not with 0 rounds) time of one meta-gradient.

    Memory first: it is that of the first unroll of this size, so that buffers which the engine
    keeps for the next one count. What the lanes share and is there before (theta_0, the rule's
    factors) does not. A small unroll first of all loads kernels and libraries.
    """
    small = world(RecurrentLM(50, 8, 8, 1), place.segment, place.lanes, number=4)
    with LiveBytes():
        unroll(mode, *small)()
    work = unroll(mode, *world(place.shape, place.segment, place.lanes, number=updates))
    before = resident_peak()
    with LiveBytes() as meter:
        work()
    after = resident_peak()
    resident = None if before is None or after is None else after - before
    seconds = None
    if rounds:
        again = max(1, rounds * REPEATED // updates)
        seconds = statistics.median(side_by_side({mode: work}, again, warm_up=0)[mode])
    return Cost(seconds, meter.peak, resident)


def probe_alone(mode: GradientMode, updates: int, rounds: int, *, number: int) -> Cost:
    """`probe` in a fresh process with so many threads."""
    words = ["--rounds", str(rounds), "--threads", str(number), "--probe", mode, str(updates)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", *words],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Cost(**json.loads(done.stdout))


# -- the axis -------------------------------------------------------------------------------


def unroll_axis(
    cost: Callable[[GradientMode, int, int], Cost],
    rounds: int,
    place: Place = UNROLL,
    lengths: Sequence[int] = LENGTHS,
    read: int = READ,
    far: tuple[int, int] = (LONG, SHORT),
) -> list[dict[str, Any]]:
    """Rows of the axis: time and peak memory of every mode and T, long against short, ageing.

    Args:
        cost: measures one (mode, T) so many rounds.
        read: updates of the article that `read` is timed on.
        far: a long unroll, of whose modes other than reverse the memory is compared with that of
            reverse mode at the short one, one of `lengths`.
    """
    long, short = far
    rows: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    reverse: dict[int, int] = {}
    for mode in MODES:
        costs = [cost(mode, updates, rounds) for updates in lengths]
        rows += [_row(place, mode, *one) for one in zip(lengths, costs, strict=True)]
        whole = [[(one.seconds or 0.0) * t] for one, t in zip(costs, lengths, strict=True)]
        rows[-1]["exponent"] = exponent(lengths, whole)
        rows[-1]["memory exponent"] = exponent(lengths, [[one.live] for one in costs])
        if mode == "reverse":
            reverse = {t: one.live for t, one in zip(lengths, costs, strict=True)}
            continue
        most = cost(mode, long, 0)
        rows.append(_row(place, mode, long, most))
        what = f"{mode}: memory of an unroll of {long:,} over reverse at {short}"
        share = most.live / reverse[short]
        shares.append({"axis": "unroll", "what": what, "size": long, "ratio": share})
    return rows + shares + ageing(rounds, place, lengths[-1], read)


def _row(place: Place, mode: GradientMode, updates: int, cost: Cost) -> dict[str, Any]:
    """What is told of one (mode, T)."""
    row: dict[str, Any] = {"axis": "unroll", "what": mode, "size": updates}
    if cost.seconds is not None:
        row["us/token"] = 1e6 * cost.seconds
        row["ms/segment"] = 1e3 * cost.seconds * place.lanes * place.segment
    row |= {"linear in": updates, "peak MB": cost.live / 1e6}
    row["resident MB"] = None if cost.resident is None else cost.resident / 1e6
    copies = cost.live / (BYTES * place.lanes * place.weights)
    expected = formula(mode, updates, tangent_copies())
    row |= {"copies": copies, "formula": expected, "measured / formula": copies / expected}
    return row | {"dynamic weights": place.weights, "bytes per lane": cost.live / place.lanes}


def ageing(rounds: int, place: Place, updates: int, read: int) -> list[dict[str, Any]]:
    """Whether the k-th update gets slower with k: in an unroll of forward mode, and reading."""
    base, segments = world(place.shape, place.segment, place.lanes, number=max(updates, read))
    texts = {"forward": Stamped(segments[:updates]), "read": Stamped(segments[:read])}
    works = {
        "forward": unroll("forward", base, texts["forward"]),
        "read": article(base, texts["read"]),
    }
    rows = []
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            work()
            found[name].append(texts[name].ageing())
    for name, own in found.items():
        count = len(texts[name])
        what = f"{name}: time of the last fifth of {count:,} updates over the first"
        row = {"axis": "unroll", "what": what, "size": count, "ratio": statistics.median(own)}
        rows.append(row | {"lowest": min(own), "highest": max(own)})
    return rows
