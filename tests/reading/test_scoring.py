"""Scoring reports every lane that the guard resets, where it lies in its article."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from worlds import EOS, agree, articles, tiny_base, written_out

from mlm.base.names import PROTOCOLS
from mlm.models.base import AdaptationBase
from mlm.reading import lanes as reading_lanes
from mlm.reading.cache import Cache, CacheSetting
from mlm.reading.scoring import (
    Scores,
    Wanted,
    _put_together,
    score_articles,
    score_protocol,
    score_stream,
)
from mlm.report.losses import LossTable
from mlm.rules.hand_made import SGD
from mlm.rules.protocol import Bound

DYNAMIC = ("lstm.1.recurrent", "softmax.bias")
LENGTHS = (31, 0, 12, 3, 44, 1)


def _world(rate: float, limit: float) -> tuple[AdaptationBase, Bound]:
    base = dataclasses.replace(tiny_base(DYNAMIC), limit=limit)
    return base, SGD().bind({"rate": torch.tensor(rate).double()}, base)


def _under_theta_0(base: AdaptationBase) -> list[np.ndarray]:
    """Losses of every token, each segment read from an empty hidden state."""
    found = []
    for text in articles(LENGTHS):
        before = np.concatenate([[EOS], text[:-1]]) if len(text) else text
        nll = np.zeros(len(text))
        for start in range(0, len(text), base.segment):
            part = slice(start, start + base.segment)
            inputs, targets = (torch.from_numpy(x[part])[None] for x in (before, text))
            state = base.model.initial_state(1, dtype=torch.float64)
            with torch.no_grad():
                nll[part] = base.model.read(base.weights, inputs, targets, state).nll[0]
        found.append(nll)
    return found


def _beyond(scores: Scores, base: AdaptationBase) -> list[tuple[int, int]]:
    """Segments that cost so much more than under theta_0 while their lane has learned something."""
    found, fresh = [], _under_theta_0(base)
    for article, nll in enumerate(scores.nll):
        age = 0
        for start in range(0, len(nll), base.segment):
            age += 1
            end = start + base.segment
            if age > 1 and (nll[start:end] - fresh[article][start:end]).mean() > base.limit:
                found.append((article, start))
                age = 0
    return found


@pytest.mark.usefixtures("awake")
@pytest.mark.parametrize("lanes", [1, 3, 9])
def test_resets_are_reported_where_they_happen(lanes: int) -> None:
    """A step size too large: a lane explodes, starts again at theta_0 and explodes again."""
    base, rule = _world(rate=60.0, limit=4.0)
    scores = score_articles(base, rule, articles(LENGTHS), EOS, lanes)
    assert sorted(scores.flushes) == _beyond(scores, base)
    assert {article for article, _ in scores.flushes} == {0, 2, 4}
    assert len(scores.flushes) > 3
    assert all(start > 0 for _, start in scores.flushes)


def test_lanes_that_break_are_reported() -> None:
    """Weights that give no number: every segment but an article's first is read at theta_0."""
    base, rule = _world(rate=1e308, limit=np.inf)
    texts = articles(LENGTHS)
    scores = score_articles(base, rule, texts, EOS, 3)
    later = [(a, at) for a, text in enumerate(texts) for at in range(5, len(text), 5)]
    assert sorted(scores.flushes) == later
    assert np.isfinite(scores.total)


@pytest.mark.parametrize("protocol", ["article", "stream"])
def test_nothing_is_reported_where_nothing_is_reset(protocol: str) -> None:
    base, rule = _world(rate=0.01, limit=50.0)
    for some in (rule, None):
        assert score_protocol(base, some, articles(LENGTHS), EOS, protocol, 2).flushes == []


@pytest.mark.usefixtures("awake")
def test_resets_in_a_stream_are_reported_in_the_article_they_lie_in() -> None:
    """Also where a segment begins with an article, behind one without a token."""
    base, rule = _world(rate=60.0, limit=4.0)
    texts = articles((12, 3, 0, 20, 31, 1))
    where = [(a, at) for a, text in enumerate(texts) for at in range(len(text))]
    joined = score_articles(base, rule, [np.concatenate(texts)], EOS, 1)
    stream = score_stream(base, rule, texts, EOS)
    assert stream.flushes == [where[at] for _, at in joined.flushes]
    assert (3, 0) in stream.flushes
    assert len({article for article, _ in stream.flushes}) >= 3


def test_new_weights_are_never_written_over_those_they_come_from(monkeypatch) -> None:
    """Rules may read all weights for any of them; so it stays when lanes drop out."""
    base, rule = _world(rate=0.01, limit=50.0)
    update, lanes = rule.update, set()

    def spy(weights, gradients, signal, out):
        lanes.add(len(signal.age))
        for name, tensor in weights.items():
            assert out[name].shape == tensor.shape
            assert out[name].data_ptr() != tensor.data_ptr()
        return update(weights, gradients, signal, out)

    monkeypatch.setattr(rule, "update", spy)
    score_articles(base, rule, articles(LENGTHS), EOS, 3)
    assert lanes == {1, 2, 3}


def test_scores_with_a_cache_report_the_same_resets() -> None:
    base, rule = _world(rate=60.0, limit=4.0)
    settings = [CacheSetting(0.3, 0.1, 9), CacheSetting(1.0, 0.5, 9)]
    scores = score_articles(base, rule, articles(LENGTHS), EOS, 2, cache=settings)
    assert len(scores.cached) == 2
    assert scores.flushes
    for cached in scores.cached:
        assert cached.flushes == scores.flushes
        assert cached.total != scores.total


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_time_of_caches_is_not_the_rules(protocol: str, monkeypatch) -> None:
    base, rule = _world(rate=0.01, limit=50.0)
    mix, wait = Cache.mix, 0.01

    def slow(*args):
        time.sleep(wait)
        return mix(*args)

    monkeypatch.setattr(Cache, "mix", slow)
    settings = [CacheSetting(0.3, 0.1, 9)]
    scores = score_protocol(base, rule, articles(LENGTHS), EOS, protocol, 2, None, settings)
    segments = sum(LENGTHS) / base.segment
    assert scores.cached[0].seconds - scores.seconds > wait * segments / 2


@pytest.mark.parametrize("kind", ["static", "sgd"])
def test_articles_without_a_token_have_no_losses(kind: str) -> None:
    base, rule = _world(rate=0.01, limit=50.0)
    settings = [CacheSetting(0.3, 0.1, 9)]
    some = None if kind == "static" else rule
    scores = score_articles(base, some, articles((0, 0)), EOS, 2, cache=settings)
    assert [len(nll) for nll in (*scores.nll, *scores.cached[0].nll)] == [0] * 4
    assert scores.total == 0


CACHES = (CacheSetting(0.3, 0.1, 9), CacheSetting(1.0, 0.5, 3))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["static", "sgd"])
@pytest.mark.parametrize("cutoffs", [(), (4, 9)])
def test_what_was_expected_is_what_every_token_would_have_cost(
    protocol: str, kind: str, cutoffs: tuple[int, ...], monkeypatch
) -> None:
    """Of some tokens, with caches and an adaptive softmax, a few rows at a time."""
    monkeypatch.setattr(reading_lanes, "_AT_ONCE", 40)
    base = tiny_base(DYNAMIC, cutoffs=cutoffs)
    rule = None if kind == "static" else SGD().bind({"rate": torch.tensor(0.3).double()}, base)
    texts = articles((11, 0, 23, 1))
    at = [np.array(places, int) for places in ([0, 3, 4, 10], [], [2, 9, 22], [])]
    more = (base, rule, texts, EOS, protocol, 2, None, CACHES)
    scores, plain = score_protocol(*more, Wanted(at, 3)), score_protocol(*more)
    assert [list(one.details) for one in (plain, *plain.cached)] == [[]] * 3
    for column, (one, other) in enumerate(
        zip((scores, *scores.cached), (plain, *plain.cached), strict=True)
    ):
        np.testing.assert_array_equal(np.concatenate(one.nll), np.concatenate(other.nll))
        assert [len(found.rank) for found in one.details] == [4, 0, 3, 0]
        for place, (text, own) in enumerate(zip(texts, at, strict=True)):
            before = texts[:place] if protocol == "stream" else []
            whole, begin = np.concatenate([*before, text]), sum(map(len, before))
            if len(own):
                want = written_out(base, rule, whole, begin + own, CACHES)[column]
                agree(one.details[place], want, text[own])


def test_processes_put_together_what_was_expected_by_article() -> None:
    base, rule = _world(rate=0.3, limit=50.0)
    texts = articles((11, 23, 7))
    at = [np.array(places) for places in ([0, 4], [2, 9, 22], [6])]
    whole = score_articles(base, rule, texts, EOS, 3, None, CACHES, Wanted(at, 2))
    parts = [
        (mine, score_articles(base, rule, [texts[a] for a in mine], EOS, 2, None, CACHES, own))
        for mine in ([2, 0], [1])
        for own in [Wanted([at[a] for a in mine], 2)]
    ]
    found = _put_together(parts, 3)
    for one, other in zip((found, *found.cached), (whole, *whole.cached), strict=True):
        for mine, theirs in zip(one.details, other.details, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
def test_a_rule_and_its_cache_are_read_at_once(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """The losses are those of each read alone; a cache alone needs no plain row."""
    both, apart = finished.copy(tmp_path / "both"), finished.copy(tmp_path / "apart")
    rules = ("rms", "rms+cache")
    assert command("evaluate", both, "--no-draw", "--rules", *rules).code == 0
    for rule in rules:
        assert command("evaluate", apart, "--no-draw", "--rules", rule).code == 0
    tables = [LossTable.load(folder / "losses.parquet") for folder in (both, apart)]
    for protocol in PROTOCOLS:
        for rule in rules:
            one, other = (table.loss(rule, protocol) for table in tables)
            np.testing.assert_array_equal(one, other)
        assert (tables[0].loss("rms", protocol) != tables[0].loss("rms+cache", protocol)).any()
