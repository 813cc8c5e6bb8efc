"""Interpolated modified Kneser-Ney n-grams over a run's own tokens: what counting alone predicts.

    python -m benchmarks.kneser_ney runs/wikipedia --split valid

Counts are of the articles that stage 1 trained on. An n-gram of the highest order counts how often
it came, a shorter one how many different tokens came before it; three discounts per order follow
from the counts of counts (Chen and Goodman 1999, section 3). Contexts reach back to the `<eos>`
before an article's first token, as the language model's do, and no further.
Letters: N tokens, V vocabulary, n order; an n-gram is one number, its tokens' digits in base V + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlm.base.errors import UserError

ORDER = 5


@dataclass(frozen=True)
class _Order:
    """What training text says of one order n: sorted n-grams and sorted contexts."""

    grams: np.ndarray
    """(G,) int64, sorted."""
    kept: np.ndarray
    """(G,) float32: count less discount, as a share of the context's."""
    contexts: np.ndarray
    """(C,) int64, sorted: n-grams without their last token."""
    left: np.ndarray
    """(C,) float32: what the discounts leave for the order below."""


def _digits(tokens: np.ndarray, order: int, base: int) -> np.ndarray:
    """The n-grams that end at each token but the first `order - 1`: (N - order + 1,) int64."""
    number = len(tokens) - order + 1
    found = np.zeros(max(0, number), np.int64)
    for k in range(order if number > 0 else 0):
        found = found * base + tokens[k : k + number]
    return found


def _padded(articles: Sequence[np.ndarray], order: int, eos: int, pad: int) -> np.ndarray:
    """All articles behind each other, each behind `order - 2` times `pad` and an `<eos>`."""
    start = np.array([pad] * (order - 2) + [eos], np.int64)[-(order - 1) :]
    return np.concatenate([part for article in articles for part in (start, article)])


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D_0 = 0, D_1, D_2 and D_3+ from the counts of counts (Chen and Goodman 1999, eq. 17)."""
    seen = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if not seen.all():  # a small text: one discount for all (Ney et al. 1994), or none
        share = seen[0] / (seen[0] + 2 * seen[1]) if seen[0] else 0.0
        return np.array([0.0, share, share, share])
    y = seen[0] / (seen[0] + 2 * seen[1])
    return np.array([0.0, *(k - (k + 1) * y * seen[k] / seen[k - 1] for k in (1, 2, 3))])


def _order(grams: np.ndarray, counts: np.ndarray, base: int) -> _Order:
    discounts = _discounts(counts)
    less = discounts[np.minimum(counts, 3)]
    contexts, first = np.unique(grams // base, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    freed = np.add.reduceat(less, first)
    sizes = np.diff(np.append(first, len(grams)))
    kept = (counts - less) / np.repeat(totals, sizes)
    return _Order(grams, kept.astype(np.float32), contexts, (freed / totals).astype(np.float32))


def _find(sorted_values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places, which of them hold what is wanted)."""
    at = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return at, sorted_values[at] == wanted


class KneserNey:
    """An interpolated modified Kneser-Ney model of orders 1 to `order`."""

    def __init__(
        self, articles: Sequence[np.ndarray], vocabulary: int, eos: int, order: int = ORDER
    ) -> None:
        """Count `articles`, arrays of tokens below `vocabulary`.

        Raises:
            UserError: numbers of 63 bits cannot hold such n-grams.
        """
        self.order, self.vocabulary, self.eos = order, vocabulary, eos
        self.base = base = vocabulary + 1
        if base**order >= 1 << 63:
            longest = int(63 * math.log(2) / math.log(base))
            raise UserError(f"{vocabulary:,} tokens: use an order of {longest} at most")
        tokens = _padded(articles, max(2, order), eos, vocabulary)
        lengths = [len(article) for article in articles]
        counted = self._counted(lengths, max(2, order))
        self.orders: list[_Order] = []
        grams, counts = np.unique(
            _digits(tokens, order, base)[counted[order - 1 :]], return_counts=True
        )
        for n in range(order, 0, -1):
            self.orders.insert(0, _order(grams, counts, base))
            if n > 1:  # how many different tokens came before it
                grams, counts = np.unique(grams % base ** (n - 1), return_counts=True)

    @staticmethod
    def _counted(lengths: Sequence[int], order: int) -> np.ndarray:
        """Which of the padded tokens are the articles' own: (N,) bool."""
        parts = []
        for length in lengths:
            parts += [np.zeros(order - 1, bool), np.ones(length, bool)]
        return np.concatenate(parts)

    def probabilities(self, article: np.ndarray) -> np.ndarray:
        """(N,) float64: of every token of an article, given those before it."""
        width = max(2, self.order)
        tokens = _padded([np.asarray(article, np.int64)], width, self.eos, self.vocabulary)
        p = np.full(len(article), 1 / self.vocabulary)
        for n, of in enumerate(self.orders, start=1):
            grams = _digits(tokens[width - n :], n, self.base)
            context, known = _find(of.contexts, grams // self.base)
            at, seen = _find(of.grams, grams)
            kept = np.where(seen, of.kept[at], 0.0)
            p = np.where(known, kept + of.left[context] * p, p)
        return p

    def nll(self, article: np.ndarray) -> np.ndarray:
        """(N,) float64: losses in nats."""
        return -np.log(self.probabilities(article))


def mixed(nll: np.ndarray, other: np.ndarray, weight: float) -> np.ndarray:
    """Losses of `(1 - weight) p + weight q`, whose own losses are `nll` and `other`."""
    if not 0 < weight < 1:
        return other if weight else nll
    return -np.logaddexp(np.log1p(-weight) - nll, np.log(weight) - other)
