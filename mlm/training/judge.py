"""How a step of meta-training is judged: nats gained on validation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlm.models.base import AdaptationBase
from mlm.reading.scoring import score_articles
from mlm.rules.gates import LinearGates
from mlm.rules.protocol import Parameters
from mlm.training.tuning import TuneText


def validation_gain(
    base: AdaptationBase,
    rule: LinearGates,
    parameters: Parameters,
    text: TuneText,
    static: dict[str, float],
) -> float:
    """Nats per token gained over static, averaged over the protocols in `static`.

    The stream is read as a few parallel texts here (only to choose a step; scores are not).
    """
    bound = rule.bind(parameters, base)
    tokens = sum(len(a) for a in text.articles)
    gains = []
    for protocol, without in static.items():
        articles = _judged(text, protocol)
        own = base.for_protocol(protocol)
        nll = score_articles(own, bound, articles, text.eos, text.lanes).total
        gains.append((without - nll) / tokens)
    return float(np.mean(gains))


def _judged(text: TuneText, protocol: str) -> list[np.ndarray]:
    """The texts a step is judged on: the articles, or a few parallel streams of them."""
    articles = list(text.articles)
    return _joined(articles, 4) if protocol == "stream" else articles


def _joined(articles: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Successive articles joined to at most `number` texts of about equal length."""
    total, texts, part, size = sum(len(a) for a in articles), [], [], 0
    for article in articles:
        part.append(article)
        size += len(article)
        if size >= total / number:
            texts.append(np.concatenate(part))
            part, size = [], 0
    return [*texts, np.concatenate(part)] if part else texts


def static_of(base: AdaptationBase, text: TuneText, protocols: Sequence[str]) -> dict[str, float]:
    """Static losses in nats of the texts `validation_gain` reads, by protocol."""
    found = {}
    for protocol in protocols:
        articles = _judged(text, protocol)
        found[protocol] = score_articles(base, None, articles, text.eos, text.lanes).total
    return found
