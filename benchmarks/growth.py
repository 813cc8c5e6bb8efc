"""How do time and memory grow with lanes, hidden size, segment, unroll and vocabulary?

    python -m benchmarks.growth --only lanes unroll

Every axis changes one size and keeps the others; its points take turns. Timed are static scoring,
adapting while scoring (Krause's rule) and a step of meta-training; on the axis of unrolls, the
meta-gradient in each mode, and its peak memory is measured (see `growth_unroll`). `exponent` is
the slope of log time per segment of all lanes (there: per unroll) against log size between the
last two points: 1 is linear. The hidden size counts by the weights it stands for, which are
quadratic in it: `in weights`. What grows faster than linear is named.
Writes <out>/growth.json, in which axes not measured now keep their rows, and a picture of every
axis, growth_<axis>, with its numbers beside it. On the CPU.
Letters: B lanes, M tokens per segment, T updates of an unroll, N dynamic weights of a lane.
"""

from __future__ import annotations

import mlm  # noqa: F401

# isort: split
# The package comes before torch: it tells OpenMP not to spin, which others on the machine slow.
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import tyro

from benchmarks import ceiling
from benchmarks.growth_picture import draw
from benchmarks.growth_unroll import AxisName, Place, exponent, probe, probe_alone, unroll_axis
from benchmarks.output import HOME
from benchmarks.timing import (
    BYTES,
    SIZES,
    Work,
    record,
    side_by_side,
    threads,
    versions,
    world,
)
from mlm.base.errors import run_cli
from mlm.models.recurrent import RecurrentLM
from mlm.reading.meta_gradient import GradientMode
from mlm.reading.static import StaticReader
from mlm.store.run_folder import commit, machine

AXES: tuple[AxisName, ...] = get_args(AxisName)
STATIC, ADAPTING, META = "static scoring", "adapting", "meta-training"
WORSE = 1.1
"""Exponents above it are named: 1 and what the measurement leaves uncertain."""
SHOWN = ("axis", "what", "size", "us/token", "ms/segment", "exponent", "in weights", "peak MB")
SHOWN += ("copies", "formula", "measured / formula", "ratio")


@dataclass(frozen=True)
class Options:
    """How time and memory grow."""

    rounds: int = 3
    """Times that every point has its turn."""
    updates: int = 2
    """Segments per turn of scoring and adapting."""
    unroll: int = 5
    """Updates per meta-gradient, but on the axis of that name."""
    threads: int = 1
    """CPU threads; 0 = PyTorch's choice."""
    only: tuple[AxisName, ...] = ()
    """Axes to measure; none named = all."""
    large: bool = False
    """Also hidden size 1024: some 10 GiB."""
    probe: tuple[GradientMode, int] | None = None
    """Only measure one meta-gradient, (mode, T), and print it as JSON: how the benchmark calls
    itself."""
    out: Path = HOME / "growth"
    """Folder of growth.json and the pictures."""


# -- axes of time ---------------------------------------------------------------------------


TIMED: dict[AxisName, tuple[Place, tuple[int, ...]]] = {
    "lanes": (Place(SIZES["S"]), (1, 2, 4, 8, 16, 32, 64)),
    # Few words, so that the LSTM and not the softmax is what grows.
    "hidden": (Place(RecurrentLM(1000, 256, 256, 1)), (64, 128, 256, 512)),
    "segment": (Place(SIZES["S"]), (5, 10, 20, 40, 64, 100)),
    "vocabulary": (Place(SIZES["S"]), (1000, 4000, 16_000, 33_000)),
}


def static_scoring(place: Place, updates: int) -> Work:
    """`StaticReader` with the segments of the other rows."""
    base, segments = world(place.shape, place.segment, place.lanes, number=updates)
    reader = StaticReader(base, place.lanes)

    def work() -> int:
        for segment in segments:
            reader.read(segment)
        return sum(segment.targets.numel() for segment in segments)

    return work


def works(place: Place, options: Options) -> dict[str, Work]:
    """The three things timed at a place."""
    same = ceiling.Options(
        lanes=place.lanes, updates=options.updates, unroll=options.unroll, device="cpu"
    )
    return {
        STATIC: static_scoring(place, options.updates),
        ADAPTING: ceiling.adapting(place.shape, same, place.segment, learned=False),
        META: ceiling.meta_training(place.shape, same, place.segment),
    }


def _bytes(place: Place, what: str, options: Options) -> dict[str, int | None]:
    """What a lane holds and an update moves, by the letters.

    Theta, gradient and the new theta are held, the first two read, the last written, for every
    lane; theta_0 and the rule's two factors per weight are read once for all.
    """
    copies = {STATIC: 0, ADAPTING: 3, META: 2 * options.unroll}[what]
    moved = BYTES * place.weights * (3 * place.lanes + 3)
    return {
        "dynamic weights": place.weights,
        "bytes per lane": BYTES * place.weights * copies,
        "bytes per update": moved if copies else None,
    }


def time_axis(
    axis: AxisName, base: Place, sizes: Sequence[int], options: Options
) -> list[dict[str, Any]]:
    """Rows of one axis: every work at every size, all in turn.

    Every turn is done twice and the second time counts: by then buffers and caches that the engine
    keeps are those of this point.
    """
    places = [base.moved(axis, size) for size in sizes]
    entries = {
        (what, size): work
        for size, place in zip(sizes, places, strict=True)
        for what, work in works(place, options).items()
    }
    twice: dict[str, Work] = {}
    for (what, size), work in entries.items():
        twice |= {f"before {what} {size}": work, f"{what} {size}": work}
    seconds = side_by_side(twice, options.rounds, warm_up=0)
    found = {(what, size): seconds[f"{what} {size}"] for what, size in entries}
    rows = []
    for what in (STATIC, ADAPTING, META):
        segments: list[list[float]] = []
        for size, place in zip(sizes, places, strict=True):
            own = found[what, size]
            segments.append([seconds * place.lanes * place.segment for seconds in own])
            each = {"us/token": 1e6 * statistics.median(own)}
            each["ms/segment"] = 1e3 * statistics.median(segments[-1])
            linear = place.weights if axis == "hidden" else size
            rows.append({"axis": axis, "what": what, "size": size, **each, "linear in": linear})
            rows[-1] |= _bytes(place, what, options)
        rows[-1]["exponent"] = exponent(sizes, segments)
        if axis == "hidden":
            rows[-1]["in weights"] = exponent([place.weights for place in places], segments)
    return rows


# -- the record -----------------------------------------------------------------------------


def measure(axis: AxisName, options: Options) -> list[dict[str, Any]]:
    """Rows of one axis."""
    if axis == "unroll":
        return unroll_axis(partial(probe_alone, number=options.threads), options.rounds)
    base, sizes = TIMED[axis]
    if axis == "hidden" and options.large:
        sizes = (*sizes, 1024)
    return time_axis(axis, base, sizes, options)


def steep(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What grows faster than linear, in words."""
    found = []
    for row in rows:
        slope = row.get("in weights", row.get("exponent", 0.0))
        if slope > WORSE:
            found.append(f"{row['axis']}, {row['what']}: exponent {slope:.2f}")
    return found


def write(found: dict[AxisName, list[dict[str, Any]]], options: Options) -> Path:
    """Record the rows of the axes in `found` beside those that the file has of the others."""
    path = options.out / "growth.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "probe")}
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    about["settings"] = settings
    axes = {**old.get("axes", {}), **dict.fromkeys(found, about)}
    kept = [row for row in old.get("rows", []) if row["axis"] not in found]
    rows = [*kept, *(row for own in found.values() for row in own)]
    rows.sort(key=lambda row: AXES.index(row["axis"]))
    return record("growth", rows, options, SHOWN, axes={a: axes[a] for a in AXES if a in axes})


def main() -> None:
    """Measure, print, draw and write the axes asked for."""
    options = tyro.cli(Options, description=__doc__)
    with threads(options.threads):
        if options.probe:
            print(json.dumps(probe(*options.probe, options.rounds)._asdict()))
            return
        axes: tuple[AxisName, ...] = options.only or AXES
        found: dict[AxisName, list[dict[str, Any]]] = {a: measure(a, options) for a in axes}
        for axis, rows in found.items():
            draw(axis, rows, options.out / f"growth_{axis}")
        write(found, options)
        for line in steep([row for rows in found.values() for row in rows]):
            print(f"worse than linear: {line}")


if __name__ == "__main__":
    run_cli(main)
