"""Tune the hand-made rules on validation text: every rule has the same number of evaluations.

Letters: A articles, S settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlm.errors import UserError
from mlm.learner import RMS, SGD, Parameters
from mlm.memory import LongTerm
from mlm.scoring import score_articles, score_protocol

RATES = (3e-5, 3e-3)
"""Step sizes tried at first, in weight units per update and unit RMS gradient."""
KRAUSE_DECAY = 2e-3
"""Krause et al.'s decay at M = 5; it scales with M / 5."""


@dataclass(frozen=True)
class TuneText:
    """Validation articles that settings are judged on."""

    articles: Sequence[np.ndarray]
    eos: int
    lanes: int


@dataclass(frozen=True)
class Trial:
    """One evaluation: a setting and its loss in nats (infinite = diverged)."""

    setting: dict[str, float]
    nll: float


def losses_of(
    memory: LongTerm,
    rule: SGD | RMS,
    settings: Sequence[dict[str, float]],
    text: TuneText,
    protocol: str,
) -> list[float]:
    """Total loss in nats of each setting.

    In protocol `stream` one text is one lane, so the settings are read side by side, a lane each.
    """
    like = next(iter(memory.rms.values()))

    def bound(values: list[dict[str, float]]) -> Parameters:
        columns = {key: [v[key] for v in values] for key in values[0]}
        return {
            key: torch.tensor(col if len(col) > 1 else col[0], dtype=like.dtype, device=like.device)
            for key, col in columns.items()
        }

    if protocol == "article":
        return [
            score_protocol(
                memory, rule.bind(bound([s]), memory), text.articles, text.eos, protocol, text.lanes
            ).total
            for s in settings
        ]
    whole = np.concatenate(list(text.articles))
    copies = [whole] * len(settings)
    scores = score_articles(
        memory, rule.bind(bound(list(settings)), memory), copies, text.eos, len(settings)
    )
    totals = [float(nll.sum()) for nll in scores.nll]
    return [t if np.isfinite(t) else float("inf") for t in totals]


def _spaced(low: float, high: float, number: int) -> list[float]:
    return [float(x) for x in np.geomspace(low, high, number)] if number > 1 else [low]


def _neighbours(best: float, tried: Sequence[float], gap: float) -> list[float]:
    """A value on each side: halfway (in logs) to the next one tried, or `gap` beyond the edge."""
    above, below = [r for r in tried if r > best], [r for r in tried if r < best]
    up = (best * min(above)) ** 0.5 if above else best * gap
    down = (best * max(below)) ** 0.5 if below else best / gap
    return [up, down]


def tune(
    memory: LongTerm,
    rule: SGD | RMS,
    text: TuneText,
    protocol: str,
    budget: int,
    note: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Spend exactly `budget` evaluations on a rule's settings; best trial first.

    First step sizes over two decades (at Krause's decay), then decays at the best step size, then
    step sizes next to it; further outwards when the best lies at the edge.
    """
    trials: list[Trial] = []

    def spend(settings: list[dict[str, float]]) -> None:
        settings = settings[: budget - len(trials)]
        if not settings:
            return
        for setting, nll in zip(
            settings, losses_of(memory, rule, settings, text, protocol), strict=True
        ):
            trials.append(Trial(setting, nll))
            note(trials[-1])

    def best() -> Trial:
        return min(trials, key=lambda t: t.nll)

    share = 0.4 if isinstance(rule, RMS) else 0.5
    coarse = min(budget, max(2, round(budget * share)))
    unit = 1.0 if isinstance(rule, RMS) else 1 / memory.mean_rms
    rates = _spaced(RATES[0] * unit, RATES[1] * unit, coarse)
    usual = KRAUSE_DECAY * memory.segment / 5
    fixed = {"decay": usual} if isinstance(rule, RMS) else {}
    spend([{"rate": rate, **fixed} for rate in rates])
    if isinstance(rule, RMS):
        decays = [0.0, usual * 3, usual / 3, usual * 9][: round(budget * 0.25)]
        spend([{**best().setting, "decay": decay} for decay in decays])
    gap = rates[1] / rates[0] if len(rates) > 1 else 3.0
    while len(trials) < budget:
        top = best().setting
        tried = [t.setting["rate"] for t in trials]
        spend([{**top, "rate": rate} for rate in _neighbours(top["rate"], tried, gap)])
    if not np.isfinite(best().nll):
        raise UserError(
            f"rule {rule.name}, protocol {protocol}: every setting tried diverged. Check the "
            "language model's loss (metrics.jsonl) and the Fisher (--adapt.fisher-words)"
        )
    return sorted(trials, key=lambda t: t.nll)
