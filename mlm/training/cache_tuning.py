"""Tune a neural cache on validation text, on top of any rule, with the budget every rule has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlm.base.errors import UserError
from mlm.base.processes import ranks
from mlm.base.progress import NOTHING_KEPT, Progress
from mlm.models.base import AdaptationBase
from mlm.reading.cache import CacheSetting
from mlm.reading.scoring import score_protocol
from mlm.rules.protocol import Bound
from mlm.training.tuning import Trial, Tried, TuneText

PUBLISHED = (0.3, 0.1)
"""theta and lambda that Grave et al. found best on WikiText."""


THETAS = (0.02, 3.0)
"""Range of the theta tried at first: from nearly counting words to trusting the nearest h alone."""


WEIGHTS = (0.04, 0.2)
"""The lambda tried at first: what suits a rule that adapts, and what a static model."""


def tune_cache(
    base: AdaptationBase,
    rule: Bound | None,
    text: TuneText,
    protocol: str,
    budget: int,
    window: int,
    progress: Progress = NOTHING_KEPT,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Spend exactly `budget` evaluations on theta and lambda, on top of `rule`; best trial first.

    The published setting and a coarse grid in one pass over the text, then ever closer neighbours
    of the best in one or two (more only beyond 20 evaluations, and lambda above 0.55 only there).

    theta multiplies products h . h' that are not normalised. The E entries of an LSTM's output lie
    in (-1, 1); in a trained model of E = 256, h . h is about 40 and h . h' 7 with a deviation of
    5. So theta = 0.02 nearly counts words and theta = 3 nearly copies what followed the nearest h;
    the grid is geometric between them, and neighbours may leave it.

    Args:
        window: W in tokens, the same for all settings.

    Raises:
        UserError: the losses under `rule` are not finite, whatever the cache.
    """
    tried = Tried()

    def evaluate(settings: list[dict[str, float]]) -> list[float]:
        caches = [CacheSetting(s["theta"], s["weight"], window) for s in settings]
        return _losses(base, rule, text, protocol, caches)

    def spend(pairs: Sequence[tuple[float, float]]) -> Trial:
        pairs = pairs[: budget - len(tried.trials)]
        settings = [{"theta": theta, "weight": weight} for theta, weight in pairs]
        for trial in tried.spend(settings, evaluate):
            on_trial(trial)
        tick()
        return min(tried.trials, key=lambda t: t.nll)

    with progress.of("trials", tried) as tick:
        number = max(2, (round(0.6 * budget) - 1) // len(WEIGHTS))
        thetas = np.geomspace(*THETAS, number).tolist()
        best = spend([PUBLISHED, *((theta, weight) for weight in WEIGHTS for theta in thetas)])
        if not math.isfinite(best.nll):
            raise UserError(
                f"cache, protocol {protocol}: the losses it is put on top of are not finite. Check "
                "the language model's loss (metrics.jsonl) and the rule's own scores"
            )
        theta_gap = (THETAS[1] / THETAS[0]) ** (1 / number)
        odds_gap = _odds(WEIGHTS[1]) / _odds(WEIGHTS[0])
        while left := budget - len(tried.trials):
            theta_gap, odds_gap = theta_gap**0.5, odds_gap**0.5
            around = _neighbours(**best.setting, theta_gap=theta_gap, odds_gap=odds_gap)
            best = spend(around[: max(4, math.ceil(left / 2))])
    return sorted(tried.trials, key=lambda t: t.nll)


def _losses(
    base: AdaptationBase,
    rule: Bound | None,
    text: TuneText,
    protocol: str,
    caches: Sequence[CacheSetting],
) -> list[float]:
    """Nats of the text with each cache; of a stream every process has a share of the caches."""
    own = (base, rule, text.articles, text.eos, protocol, text.lanes)
    if protocol == "article":
        return [cached.total for cached in score_protocol(*own, cache=caches).cached]
    here = ranks()
    mine = [caches[k] for k in here.share(len(caches))]

    def read() -> list[float]:
        scores = score_protocol(*own, cache=mine) if mine else None
        return [cached.total for cached in scores.cached] if scores else []

    return [total for part in here.parts(read) for total in part]


def _odds(weight: float) -> float:
    return weight / (1 - weight)


def _neighbours(
    theta: float, weight: float, theta_gap: float, odds_gap: float
) -> list[tuple[float, float]]:
    """The eight settings around one, at such ratios of theta and of lambda's odds; axes first."""
    steps = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    found = []
    for up, more in steps:
        odds = _odds(weight) * odds_gap**more
        found.append((theta * theta_gap**up, odds / (1 + odds)))
    return found
