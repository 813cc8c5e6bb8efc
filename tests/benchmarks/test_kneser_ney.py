"""Kneser-Ney n-grams against counting by hand, in dictionaries."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Command
from tiny import tiny_config, write_corpus

from benchmarks.kneser_ney import KneserNey, mixed, tuned_weight
from benchmarks.readme import engine
from mlm.base.errors import UserError
from mlm.base.names import CACHE
from mlm.reading.scoring import Scores
from mlm.report.losses import LossTable
from mlm.text.corpora import open_corpus
from mlm.text.tokens import prepare

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


def test_the_weight_of_a_mixture_is_the_best_of_a_grid() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.gamma(2, 2, 500), rng.gamma(2, 2.5, 500)
    grid = np.linspace(0, 1, 201)
    best = grid[np.argmin([mixed(one, two, weight).sum() for weight in grid])]
    assert 0.1 < best < 0.9
    assert tuned_weight(one, two) == pytest.approx(best, abs=0.005)


class Stand:
    """In the place of a trained model: losses that depend on the token, the rule and the cache."""

    best = "four_levels"

    def __init__(self, home: Path) -> None:
        self.corpus = write_corpus(home / "toy")
        self.config = tiny_config(self.corpus, home / "run")
        text = self.config.text
        source = open_corpus(str(self.corpus))
        self.vocabulary = prepare(source, "bpe", 330, text.data_dir, ("train",)).vocabulary
        self.read: list[tuple[str, str, int]] = []

    def rules_in(self, protocol: str) -> tuple[str, ...]:
        cached = ("rms+cache",) if protocol == "article" else ()
        return ("static", "rms", "two_levels", "four_levels", *cached)

    def resolved(self, rules: Sequence[str]) -> list[str]:
        return list(rules)

    def ready(self, rule: str, protocol: str) -> SimpleNamespace:
        return SimpleNamespace()

    def losses(self, articles: Sequence[np.ndarray], rule: str, protocol: str, title: str) -> Any:
        self.read.append((protocol, rule, len(articles)))
        plain = rule.removesuffix(CACHE)
        share = {"static": 1.0, "rms": 0.8, "four_levels": 0.7}[plain]
        nll = [share * (1 + np.asarray(a) % 7) for a in articles]
        below = Scores([0.9 * n for n in nll], 1.0, [], [])
        return Scores(nll, 1.0, [], [below] if rule != plain else [])


def test_the_table_has_every_rule_and_its_mixture(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path)
    monkeypatch.setattr("mlm.load", lambda name, threads: stand)
    flags = ("x", "--corpus", stand.corpus, "--out", tmp_path / "out", "--resamples", 99)
    done = command("benchmarks.kneser_ney", *flags)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "kneser_ney.json").read_text(encoding="utf-8"))
    assert found["settings"]["corpus"] == stand.corpus.name
    rows = {(row["protocol"], row["rule"]): row for row in found["rows"]}
    article = [rule for protocol, rule in rows if protocol == "article"]
    assert article[:3] == ["static", "Kneser-Ney n-grams", "static + Kneser-Ney"]
    assert len(article) == 9
    assert len(rows) == 9 + 7
    assert not [rule for rule in article if "2 levels" in rule], "it is not the best"
    # The words that are tuned on are the first article's; the others are scored.
    number = sum(1 for _ in open_corpus(str(stand.corpus)).articles("valid"))
    assert found["articles"] < number
    assert found["tuning words"] >= stand.config.evaluation.tune_words
    assert {(r, n) for p, r, n in stand.read if p == "stream"} == {
        (rule, n)
        for rule in ("static", "rms", "four_levels")
        for n in (found["articles"], number - found["articles"])
    }
    table = LossTable.load(tmp_path / "out" / "losses.parquet", "valid")
    assert len(table.articles) == found["articles"]
    for rule in ("rms", "rms+cache", "four_levels"):
        both = table.loss(f"{rule}+kneser_ney", "article")
        assert both.mean() > 0
        assert not np.allclose(both, table.loss(rule, "article"))
    assert table.loss("rms+cache", "article").mean() < table.loss("rms", "article").mean()
    best, mixture = rows["article", "4 levels"], rows["article", "4 levels + Kneser-Ney"]
    assert best["gain"] == pytest.approx(
        (table.loss("static", "article") - table.loss("four_levels", "article")).mean(), rel=1e-5
    )
    assert best["times RMS"] == pytest.approx(1.5, rel=1e-5)
    assert 0 < mixture["weight"] < 1
    assert "over the mixture" in mixture
    assert "| article | 4 levels + Kneser-Ney |" in "\n".join(
        engine(str(tmp_path / "out" / "kneser_ney.json"))
    )


def test_a_text_without_articles_to_score_is_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path)
    monkeypatch.setattr("mlm.load", lambda name, threads: stand)
    write_corpus(tmp_path / "toy", valid=1)
    done = command("benchmarks.kneser_ney", "x", "--corpus", stand.corpus, "--out", tmp_path / "o")
    assert "no article to score is left beside the 200 words" in done.error
    done = command("benchmarks.kneser_ney", "x", "--corpus", tmp_path / "none")
    assert "no corpus" in done.error
    assert not (tmp_path / "o").exists()
