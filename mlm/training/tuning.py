"""Tune the hand-made rules on validation text: every rule has the same number of evaluations.

Letters: A articles, S settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlm.base.errors import UserError
from mlm.base.processes import ranks
from mlm.base.progress import NOTHING_KEPT, Progress
from mlm.models.base import AdaptationBase
from mlm.reading.scoring import score_articles, score_protocol
from mlm.rules.hand_made import RMS, Adam, HandMade, Momentum
from mlm.rules.protocol import Parameters

RATES = (1e-4, 3e-3)
"""Step sizes tried at first, in weight units per update and unit RMS gradient: for the LSTM alone
good ones are near the upper end, for all weights in the middle."""


KRAUSE_RATE, KRAUSE_DECAY = 5e-5, 2e-3
"""Krause et al.'s published setting at M = 5; both scale with M / 5."""


USUAL = {"momentum": 0.9, "square": 1e-3}
"""What step sizes are first tried with: Adam's published moments (Kingma & Ba 2015), and the
momentum usual in deep learning, as in Titans."""


OTHERS = {"momentum": (0.0, 0.5, 0.98), "square": (0.1, 0.0, 0.01)}
"""What else is tried."""


@dataclass(frozen=True)
class TuneText:
    """Validation articles that settings are judged on."""

    articles: Sequence[np.ndarray]
    eos: int
    lanes: int


@dataclass(frozen=True)
class Trial:
    """One evaluation: a setting and its loss in nats (infinite = not a number somewhere)."""

    setting: dict[str, float]
    nll: float


class Tried:
    """The trials of a search so far: `mlm.base.progress.Work`, whose steps are readings of text.

    A search that goes on takes the way that it took before, on which kept trials answer at once.
    """

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self._kept: list[Trial] = []

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The trials; no tensor."""
        found = max(self.trials, self._kept, key=len)
        return {}, {"trials": [[trial.setting, trial.nll] for trial in found]}

    def load(self, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._kept = [Trial(setting, nll) for setting, nll in about["trials"]]

    def spend(
        self,
        settings: list[dict[str, float]],
        evaluate: Callable[[list[dict[str, float]]], Sequence[float]],
    ) -> list[Trial]:
        """The trials of settings that one reading serves."""
        at = len(self.trials)
        found = self._kept[at : at + len(settings)]
        if [trial.setting for trial in found] != settings:
            nlls = evaluate(settings)
            found = [Trial(own, nll) for own, nll in zip(settings, nlls, strict=True)]
        self.trials += found
        return found


def losses_of(
    base: AdaptationBase,
    rule: HandMade,
    settings: Sequence[dict[str, float]],
    text: TuneText,
    protocol: str,
) -> list[float]:
    """Total loss in nats of each setting.

    In protocol `stream` one text is one lane, so the settings are read side by side, a lane each,
    and shared out among processes.
    Steps so large that weights explode cost what they cost: reading resets such lanes and goes on
    (`mlm.reading.step.step`). Infinite is the loss of a model that is broken before it adapts.
    """
    like = next(iter(base.rms.values()))

    def bound(values: list[dict[str, float]]) -> Parameters:
        columns = {key: [v[key] for v in values] for key in values[0]}
        return {
            key: torch.tensor(col if len(col) > 1 else col[0], dtype=like.dtype, device=like.device)
            for key, col in columns.items()
        }

    if protocol == "article":
        return [
            score_protocol(
                base, rule.bind(bound([s]), base), text.articles, text.eos, protocol, text.lanes
            ).total
            for s in settings
        ]
    whole = np.concatenate(list(text.articles))

    def read(own: Sequence[dict[str, float]]) -> list[float]:
        if not own:
            return []
        copies, one = [whole] * len(own), rule.bind(bound(list(own)), base)
        scores = score_articles(base, one, copies, text.eos, len(own))
        totals = [float(nll.sum()) for nll in scores.nll]
        return [t if np.isfinite(t) else float("inf") for t in totals]

    here = ranks()
    own = [settings[k] for k in here.share(len(settings))]
    return [total for part in here.parts(lambda: read(own)) for total in part]


def _spaced(low: float, high: float, number: int) -> list[float]:
    return [float(x) for x in np.geomspace(low, high, number)] if number > 1 else [low]


def _neighbours(best: float, tried: Sequence[float], gap: float) -> list[float]:
    """A value on each side: halfway (in logs) to the next one tried, or `gap` beyond the edge."""
    above, below = [r for r in tried if r > best], [r for r in tried if r < best]
    up = (best * min(above)) ** 0.5 if above else best * gap
    down = (best * max(below)) ** 0.5 if below else best / gap
    return [up, down]


class _Search:
    """The settings of one rule: where to start, what to try, in which units.

    Settings are searched as they move the weights: of momentum that adds up gradients, the step
    size is `rate / (1 - momentum)`, so that another momentum alone is another memory, not another
    step size.
    """

    def __init__(self, rule: HandMade, base: AdaptationBase) -> None:
        self.names, pace = rule.settings, base.segment / 5
        self.sums = isinstance(rule, Momentum)
        scaled = isinstance(rule, RMS | Adam)
        self.unit = 1.0 if scaled else 1 / base.mean_rms
        """Of step sizes: only those over the RMS gradient are in weight units."""
        self.published = KRAUSE_RATE * pace if scaled else None
        usual = {"decay": KRAUSE_DECAY * pace, **USUAL}
        self.usual = {name: usual[name] for name in self.names if name != "rate"}
        decay = usual["decay"]
        values = {"decay": (decay / 3, 0.0, decay * 3, decay * 9), **OTHERS}
        order = ("decay", "momentum", "square")
        self.others = {name: values[name] for name in order if name in self.names}

    def rates(self, number: int) -> list[float]:
        """Step sizes over `RATES`; the one nearest to a published one gives way to it."""
        rates, published = (
            _spaced(RATES[0] * self.unit, RATES[1] * self.unit, number),
            self.published,
        )
        if published is not None:
            nearest = min(range(number), key=lambda k: abs(math.log(rates[k] / published)))
            rates[nearest] = published
        return rates

    def setting(self, point: dict[str, float]) -> dict[str, float]:
        """The rule's own settings at a point of the search."""
        share = 1 - point["momentum"] if self.sums else 1.0
        return {name: point[name] for name in self.names} | {"rate": point["rate"] * share}


def _shares(budget: int, stages: int) -> tuple[int, list[int]]:
    """(coarse step sizes, values of each other setting): at most 4/5 of the budget together."""
    coarse = min(budget, max(2, round(budget * (0.4 if stages else 0.5))))
    rest = round(budget * (0.25 if stages == 1 else 0.4)) if stages else 0
    return coarse, [rest // stages + (k < rest % stages) for k in range(stages)]


def tune(
    base: AdaptationBase,
    rule: HandMade,
    text: TuneText,
    protocol: str,
    budget: int,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    progress: Progress = NOTHING_KEPT,
) -> list[Trial]:
    """Spend exactly `budget` evaluations on a rule's settings; best trial first.

    First step sizes over `RATES`, a published one among them, at the published values of what else
    the rule has; then other decays, momentums and second moments, one after the other at the best
    setting so far; then step sizes next to the best, further outwards when it lies at the edge.
    """
    search, tried = _Search(rule, base), Tried()
    points: list[dict[str, float]] = []

    def evaluate(settings: list[dict[str, float]]) -> list[float]:
        return losses_of(base, rule, settings, text, protocol)

    def spend(wanted: list[dict[str, float]]) -> None:
        wanted = wanted[: budget - len(points)]
        points.extend(wanted)
        settings = [search.setting(point) for point in wanted]
        # In protocol `stream` settings are lanes of one reading.
        at_once = 1 if protocol == "article" else max(1, len(settings))
        for k in range(0, len(settings), at_once):
            for trial in tried.spend(settings[k : k + at_once], evaluate):
                on_trial(trial)
            tick()

    def best() -> dict[str, float]:
        return min(zip(points, tried.trials, strict=True), key=lambda pair: pair[1].nll)[0]

    with progress.of("trials", tried) as tick:
        coarse, shares = _shares(budget, len(search.others))
        spend([{"rate": rate, **search.usual} for rate in search.rates(coarse)])
        for (name, values), share in zip(search.others.items(), shares, strict=True):
            spend([{**best(), name: value} for value in values[:share]])
        gap = (RATES[1] / RATES[0]) ** (1 / (coarse - 1)) if coarse > 1 else 3.0
        while len(points) < budget:
            top, rates = best(), [point["rate"] for point in points]
            spend([{**top, "rate": rate} for rate in _neighbours(top["rate"], rates, gap)])
    trials = sorted(tried.trials, key=lambda trial: trial.nll)
    if not np.isfinite(trials[0].nll):
        raise UserError(
            f"rule {rule.name}, protocol {protocol}: every setting tried diverged. Check the "
            "language model's loss (metrics.jsonl) and the Fisher (--adapt.fisher-words)"
        )
    return trials
