"""How fast is adapting, next to doing the same with other libraries?

    pip install --no-deps -r benchmarks/requirements.txt
    python -m benchmarks.peers --size S

Same model, same rule (Krause's RMS dynamic evaluation, all LSTM weights), same random text. Losses
are compared first, token by token over several updates; a contestant whose losses differ stops the
benchmark. Prints a table and writes it to <out>/peers_SIZE.json. The meta rows compare the
first-order meta-gradient of an unroll for rate and decay: same loss, same gradient.
Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

import mlm  # noqa: F401

# isort: split
# The package comes before torch: it tells OpenMP not to spin, which others on the machine slow.
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.contestants import (
    COMPILED,
    CONTESTANTS,
    OURS,
    Contestant,
    Setting,
    fused,
    higher_optimizer,
)
from benchmarks.output import HOME
from benchmarks.timing import (
    SIZES,
    Work,
    World,
    best_threads,
    ratio,
    record,
    speed,
    world,
)
from mlm.base.errors import UserError, run_cli
from mlm.models.base import AdaptationBase
from mlm.models.recurrent import RecurrentLM
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.step import begin
from mlm.rules.gates import FLUSH_UNIT, LinearGates
from mlm.runs.run import choose_device
from mlm.text.streams import Segment

SETTING = Setting(rate=3e-3, decay=8e-3)
"""Of the usual size; on random text a rate 10 % off changes losses by 1e-2."""
TOLERANCE = 1e-5
"""Nats. Rounding in float32 leaves 1e-6 at a loss of 8."""
META_TOLERANCE = 2e-3
"""Relative, of the meta-gradient: a sum of 1e6 terms of both signs in float32."""
META_OURS, META_HIGHER = "meta-training: ours", "meta-training: higher"
INSTALL = "pip install --no-deps -r benchmarks/requirements.txt"


@dataclass(frozen=True)
class Options:
    """Adapting with this project and with other libraries, side by side."""

    size: Literal["S", "M", "L"] = "S"
    """Sizes of the model: S = 1 x 256, M = 2 x 650, L = AWD-LSTM's 3 x 1150. Everybody's lanes are
    in memory at once: 16 of L take some 25 GiB; give fewer --lanes where that is too much."""
    rounds: int = 7
    """Times that every contestant has its turn."""
    lanes: int = 16
    """B: articles side by side."""
    segment: int = 20
    """M: tokens per update."""
    updates: int = 4
    """Segments per turn; four times as many for those who read one article at a time."""
    unroll: int = 8
    """Segments per meta-gradient; 0 = no meta rows."""
    compile: bool = False
    """Also torch.func under torch.compile, which takes a minute or more before the first turn."""
    threads: int = 0
    """CPU threads for all; 0 = for everybody what is faster, one or PyTorch's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA if there is one."""
    out: Path = HOME / "peers"
    """Folder of peers_SIZE.json."""


def problem(library: str | None) -> str | None:
    """Why a library cannot be used, None if it can."""
    if library is None:
        return None
    try:
        importlib.import_module(library)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            return f"not installed: {INSTALL}"
        return f"cannot be imported: {error}"
    return None


# -- the same losses ------------------------------------------------------------------------


def losses(
    contestant: Contestant, place: World, setting: Setting, lanes: int, updates: int
) -> Tensor:
    """Losses (T, B, M) of the first segments, the weights updated after each."""
    step = contestant.side_by_side(place.base, setting, lanes)
    return torch.stack([step(segment) for segment in place.segments[: updates + 1]])


def difference(name: str, found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> float:
    """Largest absolute difference of the losses.

    Raises:
        UserError: they differ by more than rounding.
    """
    largest = float((found - wanted).abs().max())
    if not largest <= tolerance:  # also when it is not a number
        raise UserError(
            f"{name}: losses differ from ours by {largest:.2g} nats where {tolerance:.2g} is "
            "rounding; it does not compute the same thing, so its speed says nothing"
        )
    return largest


# -- the work -------------------------------------------------------------------------------


def endless(place: World, lanes: int) -> Iterator[Segment]:
    """The opening segment, then the others over and over."""
    chosen = [segment.select(np.arange(lanes)) for segment in place.segments]
    yield chosen[0]
    yield from itertools.cycle(chosen[1:])


def reading_work(contestant: Contestant, place: World, options: Options) -> Work:
    """A turn: the next few segments of an article that is open already."""
    lanes = 1 if contestant.alone else options.lanes
    step = contestant.make(place.base, SETTING, lanes)
    text = endless(place, lanes)
    step(next(text))
    number = options.updates * (4 if contestant.alone else 1)

    def work() -> int:
        pieces = list(itertools.islice(text, number))
        for segment in pieces:
            step(segment)
        return sum(segment.targets.numel() for segment in pieces)

    return work


# -- meta-training --------------------------------------------------------------------------


def our_meta(place: World, lanes: int, unroll: int) -> Callable[[], tuple[float, Tensor]]:
    """`meta_gradient` of the three-level gates at Krause's rule: (loss, gradient).

    The gradient is by log rate and by decay, to compare; it comes with that of all other
    parameters of the gates.
    """
    rule = LinearGates()
    parameters = rule.start_at_rms(place.base, *SETTING)

    def run() -> tuple[float, Tensor]:
        bound = rule.bind(parameters, place.base)
        reader = begin(place.base, lanes)
        found = meta_gradient(place.base, bound, parameters, reader, place.segments[:unroll])
        rate = found.gradients["update"][:, 0].sum()
        decay = found.gradients["flush_scale"].sum() / FLUSH_UNIT
        return found.loss, torch.stack([rate, decay])

    return run


def higher_meta(base: AdaptationBase) -> Callable[[list[Segment]], tuple[float, Tensor]]:
    """The same with `higher`, of one article: gradients detached in the update = first order."""
    higher = importlib.import_module("higher")
    model = fused(base)
    optimizer = higher_optimizer(base, model, SETTING)
    like = next(iter(base.rms.values()))

    def run(segments: list[Segment]) -> tuple[float, Tensor]:
        phi = [like.new_tensor(value).requires_grad_() for value in SETTING]
        total, state = like.new_zeros(()), model.start()
        # cuDNN's LSTM has no second derivative, which the library's graph prepares for.
        with (
            torch.backends.cudnn.flags(enabled=False),
            higher.innerloop_ctx(
                model, optimizer, override={"rate": phi[:1], "decay": phi[1:]}
            ) as (reader, inner),
        ):
            for t, segment in enumerate(segments):
                nll, after = reader(segment.inputs[0], segment.targets[0], state)
                state = [(h.detach(), c.detach()) for h, c in after]
                if t:
                    total = total + nll.sum()
                if t < len(segments) - 1:
                    inner.step(nll.mean(), grad_callback=_constants)
        mean = total / sum(segment.targets.numel() for segment in segments[1:])
        rate, decay = torch.autograd.grad(mean, phi)
        return float(mean.detach()), torch.stack([rate * SETTING.rate, decay])

    return run


def _constants(gradients: list[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else g.detach() for g in gradients]


def meta_difference(place: World, options: Options) -> float:
    """Difference of the meta-losses; both gradients must agree as well.

    Raises:
        UserError: they differ by more than rounding.
    """
    loss, gradient = our_meta(place, options.lanes, options.unroll)()
    article = higher_meta(place.base)
    texts = [_article(place, lane, options.unroll) for lane in range(options.lanes)]
    found = [article(text) for text in texts]
    their_loss = math.fsum(one for one, _ in found) / len(found)
    theirs = torch.stack([one for _, one in found]).mean(0)
    if not bool(((gradient - theirs).abs() <= META_TOLERANCE * theirs.abs()).all()):
        raise UserError(
            f"{META_HIGHER}: meta-gradient {theirs.tolist()}, ours {gradient.tolist()}; they do "
            "not compute the same thing"
        )
    return difference(META_HIGHER, torch.tensor(their_loss), torch.tensor(loss))


def _article(place: World, lane: int, unroll: int) -> list[Segment]:
    return [segment.select(np.array([lane])) for segment in place.segments[:unroll]]


def meta_work(place: World, options: Options) -> tuple[Work, Work]:
    """(ours, higher's): one unroll of all lanes, and of one article."""
    mine, theirs = our_meta(place, options.lanes, options.unroll), higher_meta(place.base)
    text = _article(place, 0, options.unroll)
    tokens = options.unroll * options.segment

    def all_lanes() -> int:
        mine()
        return tokens * options.lanes

    def one_article() -> int:
        theirs(text)
        return tokens

    return all_lanes, one_article


# -- the table ------------------------------------------------------------------------------


@dataclass
class _Entries:
    """What has been set up so far, by contestant."""

    work: dict[str, Work]
    off: dict[str, float | None]
    note: dict[str, str]


def _reading(
    shape: RecurrentLM, options: Options, contestants: Mapping[str, Contestant]
) -> _Entries:
    """Check every contestant's losses and prepare its turn."""
    entries = _Entries({}, {}, {})
    device = choose_device(options.device)
    places: dict[int, tuple[World, Tensor]] = {}
    for name, contestant in contestants.items():
        missing = problem(contestant.library)
        entries.note[name] = missing or contestant.note
        if missing:
            continue
        if contestant.segment not in places:
            steps, lanes = contestant.segment or options.segment, options.lanes
            if contestant.segment:  # another schedule: its own text, one article
                lanes = 1
            place = world(shape, steps, lanes, device=device)
            wanted = losses(CONTESTANTS[OURS], place, SETTING, lanes, options.updates)
            places[contestant.segment] = place, wanted
        place, wanted = places[contestant.segment]
        found = losses(contestant, place, SETTING, wanted.shape[1], options.updates)
        entries.off[name] = None if name == OURS else difference(name, found, wanted)
        entries.work[name] = reading_work(contestant, place, options)
    return entries


def _meta(shape: RecurrentLM, options: Options, entries: _Entries) -> None:
    """Add the meta rows."""
    missing = problem("higher")
    entries.note[META_OURS] = f"meta_gradient, {options.unroll} segments, all gate parameters"
    entries.note[META_HIGHER] = missing or "first order, rate and decay, one article at a time"
    if missing:
        return
    device = choose_device(options.device)
    place = world(shape, options.segment, options.lanes, device=device, number=options.unroll)
    entries.off[META_HIGHER] = meta_difference(place, options)
    entries.work[META_OURS], entries.work[META_HIGHER] = meta_work(place, options)


def compare(
    shape: RecurrentLM, options: Options, contestants: Mapping[str, Contestant] = CONTESTANTS
) -> list[dict[str, Any]]:
    """Rows of the table; `contestants` must hold ours.

    Raises:
        UserError: a contestant's losses or meta-gradients are not ours.
    """
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # float32 for everybody: nn.LSTM alone would have it
    try:
        entries = _reading(shape, options, contestants)
        if options.unroll:
            _meta(shape, options, entries)
        seconds, used = best_threads(entries.work, options.rounds, options.threads)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    rows = []
    for name, note in entries.note.items():
        row: dict[str, Any] = {"contestant": name}
        if name in seconds:
            base = seconds[META_OURS if name in (META_OURS, META_HIGHER) else OURS]
            row["threads"] = used[name]
            row["tokens/s"] = speed(seconds[name])
            row["ours/peer"] = ratio(seconds[name], base)
        row["loss difference"] = entries.off.get(name)
        rows.append({**row, "note": note})
    return rows


def main() -> None:
    """Measure, print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    contestants = CONTESTANTS | (COMPILED if options.compile else {})
    record(f"peers_{options.size}", compare(SIZES[options.size], options, contestants), options)


if __name__ == "__main__":
    run_cli(main)
