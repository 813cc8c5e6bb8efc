"""Lanes that read on: full distributions, prediction ahead, copies, frozen lanes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from worlds import EOS, articles, bigram_base, segments, tiny_base

from mlm.models.base import AdaptationBase
from mlm.reading.cache import Cache, CacheSetting
from mlm.reading.lanes import AdaptingLanes, lanes_under
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Bound
from mlm.text.streams import LaneStream

LENGTHS = (11, 23, 3, 1, 17, 8)


def _rule(base: AdaptationBase) -> Bound:
    parameters = {name: torch.tensor(value).double() for name, value in RMS_SETTING.items()}
    return RMS().bind(parameters, base)


RMS_SETTING = {"rate": 0.1, "decay": 0.05}


BASES = {
    "softmax": lambda: tiny_base(),
    "adaptive softmax": lambda: tiny_base(cutoffs=(4, 9)),
    "module": bigram_base,
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("adapting", [False, True])
def test_all_tokens_together_are_certain_and_the_target_costs_what_is_charged(
    kind: str, adapting: bool
) -> None:
    base = BASES[kind]()
    lanes = lanes_under(base, _rule(base) if adapting else None, 3)
    for segment in segments(base, LENGTHS, 3, 6):
        now = lanes.read(segment, full=True)
        assert now.log_p is not None
        torch.testing.assert_close(now.log_p.exp().sum(-1), torch.ones_like(now.nll))
        charged = -now.log_p.gather(-1, segment.targets.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(charged * segment.mask, now.nll)


@pytest.mark.parametrize("adapting", [False, True])
def test_a_prediction_ahead_leaves_no_trace(adapting: bool) -> None:
    base = tiny_base()
    rule = _rule(base) if adapting else None
    lanes, others = lanes_under(base, rule, 3), lanes_under(base, rule, 3)
    for segment in segments(base, LENGTHS, 3, 6):
        ahead = lanes.ahead(segment)
        now, want = lanes.read(segment, full=True), others.read(segment)
        assert torch.equal(now.nll, want.nll)
        torch.testing.assert_close(ahead.nll, now.nll)
        torch.testing.assert_close(ahead.log_p, now.log_p)


def test_a_copy_reads_on_by_itself() -> None:
    base = tiny_base()
    lanes = lanes_under(base, _rule(base), 3)
    first, second, third, *rest = segments(base, LENGTHS, 3, 6)
    for segment in (first, second, third):
        lanes.read(segment)
    copy = lanes.copy()
    want = [lanes.copy().read(rest[0]).nll, *(lanes.read(s).nll for s in rest)][1:]
    got = [copy.read(segment).nll for segment in rest]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_frozen_lanes_keep_their_weights() -> None:
    base = tiny_base()
    lanes = AdaptingLanes(base, _rule(base), 3)
    first, *rest = segments(base, LENGTHS, 3, 4)
    lanes.read(first)
    lanes.frozen = True
    before = {n: w.clone() for n, w in lanes.reader.weights.items()}
    nothing_new = [s._replace(new=torch.zeros(3, dtype=torch.bool)) for s in rest]
    for segment in nothing_new:
        lanes.read(segment)
    after = lanes.reader.weights
    assert all(torch.equal(after[n], w) for n, w in before.items())


@pytest.mark.parametrize("window", [3, 50])
def test_a_cache_spreads_what_it_charges(window: int) -> None:
    base = tiny_base()
    lanes, cache = lanes_under(base, None, 2), None
    texts = articles(LENGTHS)
    for segment in LaneStream(texts, 2, base.segment, EOS):
        now = lanes.read(segment, full=True)
        assert now.log_p is not None
        cache = cache or Cache([CacheSetting(0.5, 0.3, window)], now.output)
        (log_p,) = cache.spread(now.log_p, now.output, segment)
        (nll,) = cache.mix(now.nll, now.output, segment)
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones_like(nll))
        charged = -log_p.gather(-1, segment.targets.unsqueeze(-1)).squeeze(-1)
        np.testing.assert_allclose((charged * segment.mask).numpy(), (nll * segment.mask).numpy())


def test_a_guarded_reset_shows_in_the_distribution_too() -> None:
    """What a lane is charged after a reset comes from theta_0, and so does its distribution."""
    base = dataclasses.replace(tiny_base(), limit=-math.inf)
    lanes = lanes_under(base, _rule(base), 2)
    for segment in segments(base, (30, 30), 2, 4):
        now = lanes.read(segment, full=True)
        assert now.log_p is not None
        charged = -now.log_p.gather(-1, segment.targets.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(charged * segment.mask, now.nll)
