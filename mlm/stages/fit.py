"""Whether every stage fits the machine: said, chosen or refused before the first one begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mlm.base.errors import UserError
from mlm.base.names import STATIC
from mlm.base.terminal import note
from mlm.models.recurrent import BaseModel
from mlm.reading.needs import fused
from mlm.runs.machine import (
    EFFICIENCY,
    SEGMENT_SECONDS,
    SHARE,
    free_bytes,
    pace,
    resident_bytes,
)
from mlm.runs.run import Run
from mlm.settings.config import Config
from mlm.settings.flags import flag, leaves, replaced
from mlm.settings.presets import settings
from mlm.stages.needs import MODES, STAGES, Effort, Lengths, Phase, RunSizes
from mlm.text.corpora import open_corpus
from mlm.text.streams import Text
from mlm.text.tokens import TokenFile, encode_split
from mlm.training.language_model import resolve_precision, shape_of

MODE = "meta.gradient"
LANES = ("meta.lanes", "evaluation.lanes")
"""Settings that are chosen where they are left as the size has them, with `MODE` left at auto."""
LIBRARIES = {"lm": 240e6, "meta": 160e6, "evaluate": 170e6}
"""Bytes of compiled kernels and libraries that a stage loads, on a CPU."""
SAMPLE = 1_000_000
"""Tokens that the shares of an adaptive softmax's tails are counted in."""
NOTHING = Lengths(0, 0, 0, 0)
DRAWING = (5.0, 2e-5)
"""Seconds that pictures take, and more for every loss in them."""


class Limit(NamedTuple):
    """Memory that a run may use."""

    bytes: float
    said: str
    """How it comes about."""


def memory_limit(config: Config, device: torch.device) -> Limit:
    """The setting, or a share of what is free and of what this process has already."""
    if config.memory_gb:
        return Limit(config.memory_gb * 1e9, "--memory-gb")
    free = free_bytes(device)
    if free is None:
        return Limit(math.inf, "what is free is unknown here")
    own = resident_bytes() if device.type == "cpu" else 0.0
    return Limit(own + SHARE * free, "three quarters of what is free; --memory-gb sets it")


class Takes(NamedTuple):
    """What a stage takes."""

    bytes: float
    """At its peak; 0 = hardly any."""
    seconds: float


# -- sizes of texts -------------------------------------------------------------------------------


def lengths_of(text: Text) -> Lengths:
    """Sizes of a text."""
    lengths = [len(article) for article in text.articles]
    return Lengths(sum(lengths), text.words, len(lengths), max(lengths, default=0))


def lengths_of_file(file: TokenFile, articles: int) -> Lengths:
    """Sizes of the first articles of a token file; 0 = of all."""
    number = min(len(file), articles or len(file))
    lengths = np.diff(file.offsets[: number + 1])
    longest = int(lengths.max(initial=0))
    return Lengths(int(lengths.sum()), int(file.words[:number].sum()), number, longest)


def tail_shares(shape: BaseModel, articles: Iterable[np.ndarray]) -> tuple[float, ...]:
    """Which share of a text's tokens each tail of an adaptive softmax has, in its beginning."""
    counts, seen = np.zeros(len(shape.cutoffs)), 0
    for article in articles if shape.cutoffs else ():
        for k, (lo, hi, _) in enumerate(shape.clusters()[1:]):
            counts[k] += ((article >= lo) & (article < hi)).sum()
        seen += len(article)
        if seen >= SAMPLE:
            break
    return tuple(float(count) / max(1, seen) for count in counts)


def sizes_of(run: Run, scored: Lengths | None = None) -> RunSizes:
    """A run as formulas see it.

    Args:
        scored: the text to score; None = the run's own split, if that is a stage.
    """
    config, stages = run.config, set(run.config.stages)
    shape = shape_of(
        config, run.vocabulary.size if "lm" not in stages else run.data.vocabulary.size
    )
    train = held_out = valid = tune = NOTHING
    shares: tuple[float, ...] = ()
    if stages & {"lm", "meta"}:
        texts = [run.training_text(part) for part in (0, 1)]
        train, held_out = map(lengths_of, texts)
        shares = tail_shares(shape, texts[0].articles)
        if config.meta.text != "held_out":
            held_out = train
        valid = lengths_of(run.validation_text(config.lm.validation_words))
        tune = lengths_of(run.validation_text(config.evaluation.tune_words))
    if scored is None and "evaluate" in stages:
        file = encode_split(
            open_corpus(config.corpus),
            config.evaluation.split,
            run.vocabulary if "lm" not in stages else run.data.vocabulary,
            config.text.data_dir,
            progress=not run.quiet,
        )
        scored = lengths_of_file(file, config.evaluation.max_articles)
    scored = scored or NOTHING
    if tune == NOTHING:  # the validation text may be gone
        words = config.evaluation.tune_words
        tokens = round(words * scored.tokens_per_word)
        tune = Lengths(tokens, words, config.evaluation.lanes, min(tokens, scored.longest))
    half = "lm" in stages and resolve_precision(config.lm.precision, run.device) == torch.bfloat16
    served = fused(run.device)
    return RunSizes(config, shape, served, half, train, held_out, valid, tune, scored, shares)


# -- one stage ------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A stage as it was predicted."""

    name: str
    largest: Phase
    """The part with the highest peak."""
    bytes: float
    work: Effort


def predicted(sizes: RunSizes, device: torch.device, resident: float) -> list[Stage]:
    """Every stage of a run that computes, with what the process has now."""
    found = []
    for name in sizes.config.stages:
        if name in STAGES:
            parts = STAGES[name](sizes)
            largest = max(parts, key=lambda part: part.bytes)
            work = Effort()
            for part in parts:
                work = work.plus(part.work)
            more = resident + LIBRARIES[name] if device.type == "cpu" else 0.0
            found.append(Stage(name, largest, more + largest.bytes, work))
    return found


def seconds(work: Effort, device: torch.device, threads: int) -> float:
    """About how long some work takes here."""
    speed = pace(device, threads)
    products = work.products / (EFFICIENCY * speed.products)
    return products + work.moved / speed.moved + SEGMENT_SECONDS * work.segments


def shown_bytes(number: float) -> str:
    """For a reader: in GB."""
    return f"{number / 1e9:.1f} GB" if number < 1e11 else f"{number / 1e9:,.0f} GB"


def shown_seconds(number: float) -> str:
    """For a reader: in the unit that suits it, to one or two digits."""
    units = (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0))
    name, size = next((u for u in units if number >= 2 * u[1]), units[-1])
    value = number / size
    return f"about {value:,.0f} {name}" if value >= 1 else "a second"


# -- what is left open ----------------------------------------------------------------------------


def left_open(config: Config) -> list[str]:
    """The settings of `MODE` and `LANES` that are not the user's own."""
    usual, mine = leaves(settings(config.size, config.rule)), leaves(config)
    found = [MODE] if mine[MODE] == "auto" else []
    return [*found, *(path for path in LANES if mine[path] == usual[path])]


def with_recorded_choices(run: Run) -> Run:
    """A run that goes on with what was chosen for it when it began."""
    config, path = run.config, run.folder.config_file
    if not (config.resume and path.exists()):
        return run
    its = leaves(run.folder.load_config())
    chosen = {path: its[path] for path in left_open(config)}
    return run.with_config(replaced(config, chosen))


def _modes(sizes: RunSizes) -> tuple[str, ...]:
    """The meta-gradients to choose from, fastest first."""
    if any(rule.per_weight or rule.per_unit for rule in sizes.learned):
        return tuple(mode for mode in MODES if mode != "forward")
    return MODES


def _fewer(lanes: int) -> list[int]:
    """Numbers of lanes to try, most first: each about three quarters of the one before."""
    found = [lanes]
    while found[-1] > 1:
        found.append(max(1, found[-1] * 3 // 4))
    return found


def choices(sizes: RunSizes) -> Iterable[dict[str, Any]]:
    """What may be chosen for settings that are left open, best first."""
    config = sizes.config
    free, mine = left_open(config), leaves(config)
    if config.resume:
        free = [path for path in free if path == MODE]
    if "meta" not in config.stages:
        free = [path for path in free if path == "evaluation.lanes"]
    modes: Sequence[str] = _modes(sizes) if MODE in free else [config.meta.gradient]
    many = [_fewer(mine[p]) if p in free else [mine[p]] for p in LANES]
    for scored in many[1]:
        for lanes in many[0]:
            for mode in modes:
                yield {"meta.lanes": lanes, MODE: mode, "evaluation.lanes": scored}


def fitted(run: Run, scored: Lengths | None = None) -> tuple[Run, dict[str, Takes]]:
    """The run with what was left open chosen so that every stage fits, and what each takes.

    Args:
        scored: see `sizes_of`.

    Raises:
        UserError: a stage does not fit, with the setting that would.
    """
    limit, sizes = memory_limit(run.config, run.device), sizes_of(run, scored)
    resident = resident_bytes()

    def stages(values: dict[str, Any]) -> list[Stage]:
        other = sizes.with_config(replaced(sizes.config, values))
        return predicted(other, run.device, resident)

    first: dict[str, Any] | None = None
    chosen: dict[str, Any] | None = None
    for values in choices(sizes):
        first = values if first is None else first
        if all(stage.bytes <= limit.bytes for stage in stages(values)):
            chosen = values
            break
    assert first is not None
    if chosen is None:
        raise _refusal(stages, first, sizes, limit)
    threads = torch.get_num_threads()
    takes = {
        stage.name: Takes(stage.bytes, seconds(stage.work, run.device, threads))
        for stage in stages(chosen)
    }
    readings = len(run.config.evaluation.protocols) * len({STATIC, *run.config.evaluation.rules})
    if losses := sizes.scored.words * readings:
        takes["draw"] = Takes(0.0, DRAWING[0] + DRAWING[1] * losses)
    for path in (path for path in chosen if chosen[path] != first[path]):
        note(
            f"{flag(path)} {chosen[path]} instead of {first[path]}, which would need more "
            f"than the {shown_bytes(limit.bytes)} that may be used ({limit.said})"
        )
    return run.with_config(replaced(run.config, chosen)), takes


SMALLER = {
    "lm": "a smaller --hidden, --embedding or --vocabulary-size",
    "meta": "a smaller --dynamic or --rank",
    "evaluate": "a smaller --max-articles or --dynamic",
}
"""What helps where no number of lanes does."""


def _refusal(
    stages: Callable[[dict[str, Any]], list[Stage]],
    usual: dict[str, Any],
    sizes: RunSizes,
    limit: Limit,
) -> UserError:
    """Why a run does not fit, and what would."""
    worst = next(s for s in stages(usual) if s.bytes > limit.bytes)

    def fits(values: dict[str, Any]) -> bool:
        found = next(s for s in stages({**usual, **values}) if s.name == worst.name)
        return found.bytes <= limit.bytes

    modes = _modes(sizes) if worst.name == "meta" and usual[MODE] in MODES else ()
    able: list[dict[str, Any]] = [{MODE: mode} for mode in modes if fits({MODE: mode})][:1]
    for paths in ([worst.largest.lanes], LANES) if worst.largest.lanes else ():
        for more in [{}, *({MODE: mode} for mode in modes if mode != usual[MODE])]:
            lanes = {path: {**leaves(sizes.config), **usual}[path] for path in paths if path}
            if fewer := _most(lanes, lambda values, more=more: fits({**more, **values})):
                able.append({**more, **fewer})
    ways = [" ".join(f"{flag(path)} {value}" for path, value in way.items()) for way in able[:2]]
    gigabytes = math.ceil(worst.bytes / 1e8) / 10
    return UserError(
        f"{worst.largest.name} needs about {shown_bytes(worst.bytes)}, but "
        f"{shown_bytes(limit.bytes)} may be used ({limit.said}). Use "
        f"{' or '.join(ways) or SMALLER[worst.name]}; or, if the machine has it, --memory-gb "
        f"{gigabytes:g}"
    )


def _most(lanes: dict[str, int], fits: Callable[[dict[str, Any]], bool]) -> dict[str, int] | None:
    """The largest numbers of lanes, none above these, that fit; None = not even one does."""

    def at_most(number: int) -> dict[str, int]:
        return {path: min(number, own) for path, own in lanes.items()}

    low, high = 0, max(lanes.values())  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at_most(middle)) else (low, middle)
    return at_most(low) if low else None
