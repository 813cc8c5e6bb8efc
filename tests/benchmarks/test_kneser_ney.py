"""Kneser-Ney n-grams against counting by hand, in dictionaries."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from benchmarks.kneser_ney import KneserNey, mixed
from mlm.base.errors import UserError

EOS, SIZE = 0, 7


def _articles(seed: int, number: int) -> list[np.ndarray]:
    """Text with habits: a token often depends on the two before it."""
    rng = np.random.default_rng(seed)
    habits = rng.integers(0, SIZE, (SIZE, SIZE))
    found = []
    for _ in range(number):
        text = [1, 2]
        while len(text) < 60:
            likely = habits[text[-2], text[-1]]
            text.append(int(likely if rng.random() < 0.6 else rng.integers(0, SIZE)))
        found.append(np.array(text))
    return found


class ByHand:
    """Chen and Goodman 1999, equations 16 to 20, one n-gram at a time."""

    def __init__(self, articles: list[np.ndarray], order: int) -> None:
        self.order = order
        grams = [Counter[tuple[int, ...]]() for _ in range(order + 1)]
        for article in articles:
            text = [SIZE] * (order - 2) + [EOS, *article.tolist()]
            for end in range(order - 1, len(text)):
                grams[order][tuple(text[end - order + 1 : end + 1])] += 1
        for n in range(order - 1, 0, -1):
            grams[n].update(gram[1:] for gram in grams[n + 1])
        self.grams = grams
        self.discounts = [self._discounts(list(of.values())) for of in grams]
        self.behind = [defaultdict[tuple[int, ...], list[int]](list) for _ in grams]
        for n, of in enumerate(grams):
            for gram, count in of.items():
                self.behind[n][gram[:-1]].append(count)

    @staticmethod
    def _discounts(counts: list[int]) -> list[float]:
        n1, n2, n3, n4 = (sum(c == k for c in counts) for k in (1, 2, 3, 4))
        if not n1 * n2 * n3 * n4:
            return [n1 / (n1 + 2 * n2) if n1 else 0.0] * 3
        y = n1 / (n1 + 2 * n2)
        return [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]

    def p(self, context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        below = self.p(context[1:], token) if context else 1 / SIZE
        counts = self.behind[n].get(context)
        if not counts:
            return below
        less = [self.discounts[n][min(c, 3) - 1] for c in counts]
        mine = self.grams[n][(*context, token)]
        kept = mine - self.discounts[n][min(mine, 3) - 1] if mine else 0.0
        return (kept + sum(less) * below) / sum(counts)


@pytest.mark.parametrize(("order", "number"), [(1, 4), (2, 4), (3, 30), (5, 30)])
def test_it_is_what_counting_by_hand_gives(order: int, number: int) -> None:
    text = _articles(1, number)
    model, slow = KneserNey(text, SIZE, EOS, order), ByHand(text, max(2, order))
    for article in _articles(2, 2):
        before = [SIZE] * max(0, order - 2) + [EOS]
        want = []
        for token in article.tolist():
            want.append(slow.p(tuple(before[len(before) - order + 1 :]), token))
            before.append(token)
        if order > 1:
            np.testing.assert_allclose(model.probabilities(article), want, rtol=1e-5)
        else:  # one order counts occurrences, not what comes before
            counts = np.bincount(np.concatenate(text), minlength=SIZE)
            np.testing.assert_allclose(
                model.probabilities(article), counts[article] / counts.sum(), rtol=0.02
            )


def test_every_prediction_sums_to_one() -> None:
    model = KneserNey(_articles(1, 12), SIZE, EOS)
    start = _articles(3, 1)[0]
    for length in (0, 1, 2, 7, 30):
        sums = sum(
            model.probabilities(np.append(start[:length], token))[-1] for token in range(SIZE)
        )
        assert sums == pytest.approx(1, abs=1e-6)


def test_longer_contexts_help_on_text_with_habits() -> None:
    nats = [
        KneserNey(_articles(1, 40), SIZE, EOS, order).nll(_articles(1, 45)[-1]).mean()
        for order in (1, 2, 3)
    ]
    assert nats[2] < 0.9 * min(nats[:2])


def test_a_mixture_is_one_of_probabilities() -> None:
    one, two = np.array([1.0, 5.0]), np.array([2.0, 0.5])
    want = -np.log(0.7 * np.exp(-one) + 0.3 * np.exp(-two))
    np.testing.assert_allclose(mixed(one, two, 0.3), want)
    assert mixed(one, two, 0.0) is one
    assert mixed(one, two, 1.0) is two


def test_too_many_tokens_for_numbers_of_63_bits() -> None:
    with pytest.raises(UserError, match="order of 3 at most"):
        KneserNey([np.array([1, 2])], 1 << 20, EOS)
    assert math.isfinite(KneserNey([np.array([1, 2])], 4000, EOS).nll(np.array([3]))[0])
