"""Update rules: exact starting points, fast form = formula, pullback = autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from worlds import tiny_base

from mlm.base.errors import UserError
from mlm.models.base import choose_dynamic, lanes_of, reset_lanes
from mlm.rules.gates import FLUSH_UNIT, LinearGates, preprocess
from mlm.rules.hand_made import RMS, SGD
from mlm.rules.protocol import ByFormula, Signal

DYNAMIC = ("lstm.0.recurrent", "lstm.0.bias", "softmax.bias")
ROUNDING: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
"""exp(log x) and re-association cost a few units in the last place of float64."""
FEATURES = [
    (),
    ("fisher",),
    ("fisher", "loss", "age"),
    ("loss", "gradient"),
    ("fisher", "loss", "age", "gradient", "distance"),
]


def _inputs(lanes: int = 3):
    base = tiny_base(DYNAMIC)
    g = torch.Generator().manual_seed(5)

    def noise(scale: float):
        return {
            n: scale * torch.randn(lanes, *base.weights[n].shape, generator=g).double()
            for n in DYNAMIC
        }

    start = lanes_of(base.start(), lanes)
    theta = {n: start[n] + d for n, d in noise(0.05).items()}
    theta[DYNAMIC[0]][0] = start[DYNAMIC[0]][0]  # one lane still at theta_0
    signal = Signal(
        torch.tensor([2.0, 3.1, 1.2], dtype=torch.float64)[:lanes],
        torch.tensor([0.0, 4.0, 90.0], dtype=torch.float64)[:lanes],
    )
    return base, theta, noise(0.1), signal


def _random_parameters(rule: LinearGates, base, flush: float = 2.0):
    phi = rule.start_at_sgd(base, 0.05)
    g = torch.Generator().manual_seed(6)
    phi = {n: p + 0.3 * torch.randn(p.shape, generator=g).double() for n, p in phi.items()}
    if rule.flush:
        phi["flush_scale"] = phi["flush_scale"].abs() + flush
    return phi


def _close(a, b, **tolerance: Any) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_rms_is_krauses_rule() -> None:
    """Written out once more from eqs. 5 to 8 of Krause et al. 2018, weight by weight."""
    base, theta, gradient, signal = _inputs()
    rate, decay, eps = 3e-3, 0.3, 2e-5
    every = torch.cat([base.rms[n].flatten() for n in DYNAMIC])
    rule = RMS()
    phi = {
        "rate": torch.tensor(rate, dtype=torch.float64),
        "decay": torch.tensor(decay, dtype=torch.float64),
    }
    new = rule.bind(phi, base).update(theta, gradient, signal)
    for n in DYNAMIC:
        rms = base.rms[n]
        relative = torch.minimum(rms / every.mean(), torch.tensor(1 / decay, dtype=torch.float64))
        want = (
            theta[n]
            - rate * gradient[n] / (rms + eps)
            + decay * (base.weights[n] - theta[n]) * relative
        )
        torch.testing.assert_close(new[n], want, **ROUNDING)


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("flush", [True, False])
def test_gates_start_exactly_at_sgd(flush: bool, per_tensor: bool) -> None:
    base, theta, gradient, signal = _inputs()
    rule = LinearGates(flush=flush, per_tensor=per_tensor)
    got = rule.bind(rule.start_at_sgd(base, 0.07), base).update(theta, gradient, signal)
    sgd = SGD().bind({"rate": torch.tensor(0.07, dtype=torch.float64)}, base)
    _close(got, sgd.update(theta, gradient, signal), **ROUNDING)


@pytest.mark.parametrize("features", [f for f in FEATURES if "fisher" in f])
@pytest.mark.parametrize("decay", [1e-3, 0.9, 20.0])
def test_gates_start_exactly_at_rms(decay: float, features) -> None:
    """20 is so large that every flush touches its clip."""
    base, theta, gradient, signal = _inputs()
    rule = LinearGates(features=features)
    got = rule.bind(rule.start_at_rms(base, 2e-3, decay), base).update(theta, gradient, signal)
    phi = {
        "rate": torch.tensor(2e-3, dtype=torch.float64),
        "decay": torch.tensor(decay, dtype=torch.float64),
    }
    _close(got, RMS().bind(phi, base).update(theta, gradient, signal), **ROUNDING)


def test_two_levels_start_at_rms_without_its_decay() -> None:
    base, theta, gradient, signal = _inputs()
    rule = LinearGates(flush=False)
    got = rule.bind(rule.start_at_rms(base, 2e-3, 0.5), base).update(theta, gradient, signal)
    phi = {
        "rate": torch.tensor(2e-3, dtype=torch.float64),
        "decay": torch.tensor(0.0, dtype=torch.float64),
    }
    _close(got, RMS().bind(phi, base).update(theta, gradient, signal), **ROUNDING)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("flush", [0.0, 2.0, 900.0])
@pytest.mark.parametrize("free_copy", [False, True])
def test_fast_update_and_pullback_equal_the_formula(features, flush, free_copy, engine) -> None:
    """Fast form against eq. 6 and autograd; flush 900 makes some gates touch their clip."""
    base, theta, gradient, signal = _inputs()
    for on in (True, False):
        rule = LinearGates(flush=on, features=features, free_copy=free_copy)
        phi = _random_parameters(rule, base, flush)
        fast, slow = rule.bind(phi, base), ByFormula(rule, phi, base)
        before = {n: w.clone() for n, w in theta.items()}
        _close(
            fast.update(theta, gradient, signal), slow.update(theta, gradient, signal), **ROUNDING
        )
        _close(theta, before, rtol=0, atol=0)  # inputs are never written
        out = {n: torch.full_like(w, math.nan) for n, w in theta.items()}
        same = fast.update(theta, gradient, signal, out)
        assert all(same[n] is out[n] for n in out)
        _close(out, slow.update(theta, gradient, signal), **ROUNDING)
        cotangent = {n: torch.sin(w * 9 + 1) for n, w in theta.items()}
        got, want = (
            b.pullback(theta, gradient, signal, {n: c.clone() for n, c in cotangent.items()}, 0.3)
            for b in (fast, slow)
        )
        _close(got[0], want[0], rtol=1e-10, atol=1e-13)
        _close(got[1], want[1], rtol=1e-10, atol=1e-12)


def test_eq6_by_hand() -> None:
    """The gates of one weight of one lane, computed with plain numbers."""
    base, theta, gradient, signal = _inputs()
    rule = LinearGates(features=("fisher", "loss", "age", "gradient", "distance"), free_copy=True)
    phi = _random_parameters(rule, base)
    name, lane, at, p = DYNAMIC[0], 1, (3, 2), 10.0
    t0, t = float(base.weights[name][at]), float(theta[name][lane][at])
    grad, rms = float(gradient[name][lane][at]), float(base.rms[name][at])
    every = torch.cat([base.rms[n].flatten() for n in DYNAMIC])
    mean = float(every.mean())

    def pair(x: float) -> list[float]:
        if abs(x) > math.exp(-p):
            return [math.log(abs(x)) / p, math.copysign(1.0, x)]
        return [-1.0, math.exp(p) * x]

    def features(fisher: float) -> list[float]:
        return [
            1.0, fisher, math.tanh(3.1 - base.loss), 1 / math.sqrt(1 + 4.0),
            *pair(grad / (rms + 2e-5)), *pair(t - t0),
        ]  # fmt: skip

    def dot(gate: str, fisher: float) -> float:
        return sum(a * b for a, b in zip(phi[gate][0].tolist(), features(fisher), strict=True))

    with_eps = math.log((rms + 2e-5) / mean)
    i = -math.exp(dot("update", with_eps))
    z = float(phi["flush_scale"][0]) * 1e-3 * math.exp(dot("flush", math.log(rms / mean)))
    f = 1 - z + 1e-3 * dot("copy", with_eps)
    assert 0 < z < 1
    assert FLUSH_UNIT == 1e-3
    new = rule.bind(phi, base).update(theta, gradient, signal)
    assert float(new[name][lane][at]) == pytest.approx(f * t + i * grad + z * t0, rel=1e-12)


def test_preprocessing_is_andrychowiczs() -> None:
    x = torch.tensor([0.5, -2.0, 1e-6, -1e-6, 0.0], dtype=torch.float64)
    log, sign = preprocess(x)
    e10 = math.exp(10)
    want_log = [math.log(0.5) / 10, math.log(2) / 10, -1, -1, -1]
    torch.testing.assert_close(log, torch.tensor(want_log, dtype=torch.float64))
    want_sign = [1, -1, 1e-6 * e10, -1e-6 * e10, 0]
    torch.testing.assert_close(sign, torch.tensor(want_sign, dtype=torch.float64))


@pytest.mark.parametrize("features", [("fisher", "loss", "age"), ("fisher", "gradient")])
def test_nan_in_one_lane_never_touches_another(features) -> None:
    base, theta, gradient, signal = _inputs()
    rule = LinearGates(features=features)
    bound = rule.bind(_random_parameters(rule, base), base)
    clean = bound.update(theta, gradient, signal)
    bad = {n: g.clone() for n, g in gradient.items()}
    for g in bad.values():
        g[1] = math.nan
    new = bound.update(theta, bad, Signal(signal.loss, signal.age))
    for n in DYNAMIC:
        assert torch.equal(new[n][[0, 2]], clean[n][[0, 2]])
        assert bool(new[n][1].isnan().all())


def test_settings_per_lane_are_read_side_by_side() -> None:
    base, theta, gradient, signal = _inputs()
    rates, decays = [1e-3, 2e-3, 4e-3], [0.0, 0.1, 30.0]

    def tensors(rate, decay):
        return {
            "rate": torch.tensor(rate, dtype=torch.float64),
            "decay": torch.tensor(decay, dtype=torch.float64),
        }

    together = RMS().bind(tensors(rates, decays), base).update(theta, gradient, signal)
    for lane in range(3):
        alone = RMS().bind(tensors(rates[lane], decays[lane]), base)
        new = alone.update(theta, gradient, signal)
        for n in DYNAMIC:
            torch.testing.assert_close(together[n][lane], new[n][lane], **ROUNDING)


def test_projection_keeps_the_flush_alive() -> None:
    base, *_ = _inputs()
    rule = LinearGates()
    phi = rule.start_at_sgd(base, 0.1)
    phi["flush_scale"] -= 1
    rule.project(phi)
    assert float(phi["flush_scale"].min()) == 0


def test_dynamic_weights_are_chosen_by_set_or_pattern() -> None:
    weights = tiny_base().weights
    assert choose_dynamic(weights, "all") == tuple(weights)
    lstm = [n for n in weights if n.startswith("lstm")]
    assert choose_dynamic(weights, "softmax.bias, lstm") == ("softmax.bias", *lstm)
    assert choose_dynamic(weights, "lstm.*.bias") == ("lstm.0.bias", "lstm.1.bias")
    with pytest.raises(UserError, match="matches no weight"):
        choose_dynamic(weights, "lstn")
    with pytest.raises(UserError, match="empty"):
        choose_dynamic(weights, " ,")


def test_reset_touches_only_flagged_lanes() -> None:
    base, theta, *_ = _inputs()
    new = reset_lanes(theta, base.start(), torch.tensor([False, True, False]))
    for n in DYNAMIC:
        assert torch.equal(new[n][1], base.weights[n])
        assert torch.equal(new[n][[0, 2]], theta[n][[0, 2]])
