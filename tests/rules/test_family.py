"""The family of rules: each starts as any other behaves, and all ways to train one agree."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from worlds import EOS, segments, tiny_base

from mlm import kernels
from mlm.base.errors import UserError
from mlm.base.names import LEARNED, RULE_TEXTS
from mlm.kernels import buffers
from mlm.kernels.update import TILE
from mlm.models.base import AdaptationBase, lanes_of
from mlm.reading.meta_gradient import GradientMode, MetaGradient, meta_gradient
from mlm.reading.step import begin
from mlm.rules.family import (
    HAND_MADE_RULES,
    as_gates,
    describe,
    learned_rule,
    rule_from_description,
    start_at,
)
from mlm.rules.fast_gates import MomentGates
from mlm.rules.gates import Feature, LinearGates
from mlm.rules.hand_made import RMS, SGD, Adam, Momentum
from mlm.rules.moments import Moments
from mlm.rules.protocol import Bound, ByFormula, LaneByLane, LoadedRule, Parameters, Signal, Static
from mlm.rules.two_memories import TwoMemories
from mlm.runs.rules import new_rule
from mlm.settings.sections import MetaConfig
from mlm.training.tuning import TuneText, tune

DYNAMIC = ("lstm.1.bias", "softmax.bias")
SMALL = ("softmax.bias",)
FEATURES: tuple[Feature, ...] = ("fisher", "loss", "age")
SETTINGS = {"rate": 0.02, "decay": 0.05, "momentum": 0.6, "square": 0.1}
LENGTHS = (11, 23, 3, 1, 17)
MODES: tuple[GradientMode, ...] = ("reverse", "checkpoint", "forward")
ROUNDING: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
PRECISION = 1e-10
"""Largest difference over the norm of a parameter's gradient: float64 sums in another order."""


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are used again too: nobody may still need what is given away."""
    monkeypatch.setattr(buffers, "MIN_BYTES", 0)
    yield
    buffers.clear()


def _settings(name: str, **changed: float | list[float]) -> Parameters:
    """Settings of a hand-made rule, in float64."""
    values = {n: SETTINGS[n] for n in HAND_MADE_RULES[name].settings} | changed
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}


def _scattered(rule: LinearGates, base: AdaptationBase, seed: int = 4) -> Parameters:
    """Near Krause's rule, every number different and every part at work."""
    g = torch.Generator().manual_seed(seed)
    start = start_at(rule, RMS(), _settings("rms"), base) if "fisher" in rule.features else None
    phi = start or start_at(rule, SGD(), _settings("sgd"), base)
    phi = {n: p + 0.1 * torch.randn(p.shape, generator=g).double() for n, p in phi.items()}
    for name in [n for n in phi if n.endswith("flush_scale")]:
        phi[name] = phi[name].abs() + 2
    for name in phi:
        least = {"momentum": 0.2, "square": 20.0, "gain": 0.4}.get(name.removeprefix("slow/"))
        if least is not None:
            phi[name] = phi[name].abs() + least
    for part in ("mlp", "lstm"):
        if f"{part}.output" in phi:
            phi[f"{part}.output"] *= 3
    return phi


def _rule(name: str, start: str = "rms", features=FEATURES, hidden: int = 2) -> LinearGates:
    return learned_rule(
        name, features=features, per_tensor=True, free_copy=False, hidden=hidden,
        start=HAND_MADE_RULES[start],
    )  # fmt: skip


def _texts(
    base: AdaptationBase, lanes: int = 3, number: int = 4
) -> list[tuple[Parameters, Signal]]:
    """Random gradients and signals of successive segments."""
    g = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).double()

    return [
        (
            {n: 0.3 * noise(lanes, *base.weights[n].shape) for n in base.dynamic},
            Signal(2.3 + noise(lanes), torch.arange(lanes).double() + t),
        )
        for t in range(number)
    ]


def _read(rule, phi: Parameters, base: AdaptationBase, lanes: int = 3) -> list[Parameters]:
    """Dynamic weights after each of a few updates of lanes that start away from theta_0."""
    bound = rule.bind(phi, base)
    g = torch.Generator().manual_seed(9)
    weights, found = lanes_of(bound.start(), lanes), []
    for n in base.dynamic:
        weights[n][1:] += 0.1 * torch.randn(weights[n][1:].shape, generator=g).double()
    for gradients, signal in _texts(base, lanes):
        weights = bound.update(weights, gradients, signal)
        found.append({n: weights[n] for n in base.dynamic})
    return found


def _close(got, want, **tolerance: Any) -> None:
    assert list(got) == list(want)
    for n, value in want.items():
        torch.testing.assert_close(got[n], value, **tolerance, msg=lambda m, n=n: f"{n}: {m}")


def _same_reading(rule, phi, other, its, base: AdaptationBase) -> None:
    for got, want in zip(_read(rule, phi, base), _read(other, its, base), strict=True):
        _close(got, want, **ROUNDING)


# ---------------------------------------------------------------- hand-made


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("decay", [0.05, 1.4])
def test_rules_with_moments_are_those_of_their_papers(name: str, decay: float, engine) -> None:
    """Against a lane-by-lane loop; the large decay is clipped where the RMS gradient is large."""
    base = tiny_base(DYNAMIC)
    rule, phi = HAND_MADE_RULES[name], _settings(name, decay=decay)
    update, state = reference.moments(base, name), reference.moments_state(base)
    theta = [base.start() for _ in range(3)]
    own = [{n: state(n) for n in DYNAMIC} for _ in range(3)]
    bound = rule.bind(phi, base)
    weights = lanes_of(bound.start(), 3)
    for gradients, signal in _texts(base):
        weights = bound.update(weights, gradients, signal)
        for lane, n in itertools.product(range(3), DYNAMIC):
            given = phi, n, theta[lane][n], gradients[n][lane], base.weights[n]
            theta[lane][n], own[lane][n] = update(*given, 0.0, 0.0, own[lane][n])
            torch.testing.assert_close(weights[n][lane], theta[lane][n], **ROUNDING)
        assert not any(torch.equal(weights[n][0], base.weights[n]) for n in DYNAMIC)


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("decay", [0.05, 1.4])
def test_fast_hand_made_updates_equal_the_formula(name: str, decay: float, engine) -> None:
    base = tiny_base(DYNAMIC)
    rule, phi = HAND_MADE_RULES[name], _settings(name, decay=decay)
    fast, slow = rule.bind(phi, base), ByFormula(rule, phi, base)
    weights = lanes_of(fast.start(), 3)
    for gradients, signal in _texts(base):
        before = {n: w.clone() for n, w in weights.items()}
        want = slow.update(weights, gradients, signal)
        out = {n: torch.full_like(w, math.nan) for n, w in weights.items()}
        got = fast.update(weights, gradients, signal, out)
        assert all(got[n] is out[n] for n in out)
        _close(weights, before, rtol=0, atol=0)
        _close(got, want, **ROUNDING)
        weights = want


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_every_setting_may_differ_from_lane_to_lane(name: str, engine) -> None:
    base = tiny_base(DYNAMIC)
    rule = HAND_MADE_RULES[name]
    rows = {n: [v, v / 2, v * (20 if n == "decay" else 1.2)] for n, v in SETTINGS.items()}
    rows = {n: rows[n] for n in rule.settings}
    together = _read(rule, _settings(name, **rows), base)[-1]
    for lane in range(3):
        own = _settings(name, **{n: row[lane] for n, row in rows.items()})
        alone = _read(rule, own, base)[-1]
        _close(*({n: w[lane] for n, w in found.items()} for found in (together, alone)), **ROUNDING)


def test_adam_without_moments_is_rms(engine) -> None:
    base = tiny_base(DYNAMIC)
    still = _settings("adam", momentum=0.0, square=0.0)
    _same_reading(Adam(), still, RMS(), _settings("rms"), base)
    bound = Adam().bind(still, base)
    start = lanes_of(bound.start(), 3)
    after = bound.update(start, *_texts(base)[0])
    for n in DYNAMIC:
        assert torch.equal(after[f"{n}/square"], start[f"{n}/square"])


def test_momentum_without_momentum_and_decay_is_sgd(engine) -> None:
    base = tiny_base(DYNAMIC)
    plain = _settings("momentum", momentum=0.0, decay=0.0)
    _same_reading(Momentum(), plain, SGD(), _settings("sgd"), base)


# ---------------------------------------------------------------- exact starting points


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("start", HAND_MADE_RULES)
@pytest.mark.parametrize("name", LEARNED)
def test_every_learned_rule_starts_exactly_as_a_hand_made_one(
    name: str, start: str, per_tensor: bool
) -> None:
    base, other = tiny_base(DYNAMIC), HAND_MADE_RULES[start]
    rule = learned_rule(
        name, features=("loss",), per_tensor=per_tensor, free_copy=False, hidden=2, start=other
    )
    phi = start_at(rule, other, _settings(start), base)
    still = {"decay": 0.0} if name == "two_levels" and "decay" in other.settings else {}
    _same_reading(rule, phi, other, _settings(start, **still), base)


@pytest.mark.parametrize(("name", "start"), [*itertools.product(LEARNED, LEARNED)])
def test_every_learned_rule_starts_exactly_as_a_learned_one(name: str, start: str) -> None:
    """Other features, more or fewer hidden units, gates for all tensors or each; random numbers."""
    base = tiny_base(DYNAMIC)
    for hidden, flags in ((1, (True, False)), (4, (False, True))):
        per_tensor, free_copy = flags
        other = learned_rule(
            start, features=("age", "distance"), per_tensor=per_tensor, free_copy=free_copy,
            hidden=2, start=RMS(),
        )  # fmt: skip
        its = _scattered(other, base)
        rule = learned_rule(
            name, features=("loss", "age"), per_tensor=False, free_copy=False, hidden=hidden,
            start=other,
        )  # fmt: skip
        phi = start_at(rule, other, its, base)
        if name == "two_levels" and other.flush:
            other = dataclasses.replace(other, flush=False, fixed=())
            its = {n: p for n, p in its.items() if not n.startswith("flush")}
            for part in ("mlp.output", "lstm.output"):
                if part in its:
                    its[part] = its[part][:1]
        _same_reading(rule, phi, other, its, base)


def test_starts_move_the_weights_and_differ_from_each_other() -> None:
    """Else the tests above could not fail."""
    base = tiny_base(DYNAMIC)
    ends = []
    for name in LEARNED:
        rule = _rule(name, "sgd")
        ends.append(_read(rule, _scattered(rule, base), base)[-1]["softmax.bias"])
    for one, other in itertools.combinations([base.weights["softmax.bias"], *ends], 2):
        assert float((one - other).abs().max()) > 1e-3


def test_a_network_that_grows_keeps_its_new_units_alive() -> None:
    """They say nothing yet, but see something: their output weights have a gradient."""
    base = tiny_base(DYNAMIC)
    small, large = (_rule("lstm", hidden=units) for units in (1, 3))
    phi = start_at(large, small, _scattered(small, base), base)
    assert float(phi["lstm.output"][:, 1:].abs().max()) == 0
    assert float(phi["lstm.input"].view(4, 3, -1)[:, 1:].abs().min()) > 0
    found = meta_gradient(
        base, large.bind(phi, base), phi, begin(base, 2, large.bind(phi, base)),
        segments(base, LENGTHS, 2, 4),
    ).gradients  # fmt: skip
    assert float(found["lstm.output"].abs().min()) > 1e-9


def test_what_is_there_for_the_start_only_is_fixed() -> None:
    other = _rule("mlp", "adam")
    expected = {
        "tensor_steps": ("fisher", "loss", "age", "momentum", "square", "mlp"),
        "three_levels": ("fisher", "age", "momentum", "square", "mlp"),
        "surprise": ("fisher", "age", "square", "mlp"),
        "mlp": ("fisher", "age", "momentum", "square"),
    }
    for name, fixed in expected.items():
        rule = learned_rule(
            name, features=("loss",), per_tensor=True, free_copy=False, hidden=2, start=other
        )
        assert rule.fixed == fixed
    assert _rule("three_levels").fixed == ()


def test_what_else_is_fixed_counts_where_the_rule_has_it() -> None:
    def made(name: str) -> tuple[str, ...]:
        return learned_rule(
            name, features=FEATURES, per_tensor=True, free_copy=False, hidden=2, start=SGD(),
            fixed=("update.fisher", "flush.fisher"),
        ).fixed  # fmt: skip

    assert made("three_levels") == ("update.fisher", "flush.fisher")
    assert made("two_levels") == ("update.fisher",)
    assert made("tensor_steps") == ()


def test_a_rule_that_lacks_a_part_cannot_start_there() -> None:
    base = tiny_base(DYNAMIC)
    with pytest.raises(ValueError, match="lacks a part"):
        start_at(_rule("three_levels"), Adam(), _settings("adam"), base)
    with pytest.raises(UserError, match="no learned rule can start as 'static' does"):
        as_gates(Static())
    with pytest.raises(UserError, match="there is no learned rule 'nine_levels'"):
        _rule("nine_levels")


def test_every_rule_is_described_in_one_line() -> None:
    assert list(RULE_TEXTS) == ["static", *HAND_MADE_RULES, *LEARNED]
    assert all(rule.name == name for name, rule in HAND_MADE_RULES.items())


# ---------------------------------------------------------------- what is trained


def test_fixed_columns_and_parts_get_no_gradient() -> None:
    base = tiny_base(DYNAMIC)
    parts = ("loss", "flush.gradient", "update.one", "flush_scale", "momentum", "step", "lstm")
    rule = LinearGates(
        features=("fisher", "loss", "gradient"), momentum=True, square=True, per_weight=True,
        mlp=2, lstm=1, free_copy=True, fixed=(*parts, "copy"),
    )  # fmt: skip
    gradients = {n: torch.ones_like(p) for n, p in rule.initial(base).items()}
    rule.mask(gradients)
    columns = list(rule.columns)
    assert columns == ["one", "fisher", "loss", "gradient", "gradient.sign"]
    assert gradients["update"].tolist() == [[0, 1, 0, 1, 1]] * 2
    assert gradients["flush"].tolist() == [[1, 1, 0, 0, 0]] * 2
    trained = {n for n, g in gradients.items() if float(g.abs().sum()) > 0}
    assert trained == {"update", "flush", "square", "mlp.input", "mlp.output"}


def test_nothing_is_fixed_unless_asked_for() -> None:
    base, rule = tiny_base(DYNAMIC), _rule("lstm", "adam")
    gradients = {n: torch.ones_like(p) for n, p in rule.initial(base).items()}
    dataclasses.replace(rule, fixed=()).mask(gradients)
    assert all(bool((g == 1).all()) for g in gradients.values())


def test_what_cannot_be_fixed_is_named() -> None:
    with pytest.raises(UserError, match=r"rule three_levels: flsh cannot be fixed; choose from"):
        LinearGates(fixed=("flsh",))


def test_projection_keeps_momentum_and_square_within_bounds() -> None:
    base = tiny_base(DYNAMIC)
    rule = LinearGates(momentum=True, square=True)
    phi = {n: torch.full_like(p, 300.0) for n, p in rule.initial(base).items()}
    rule.project(phi)
    assert (float(phi["momentum"].max()), float(phi["square"].max())) == (0.999, 100.0)
    phi = {n: torch.full_like(p, -3.0) for n, p in phi.items()}
    rule.project(phi)
    assert float(phi["momentum"].min()) == float(phi["square"].min()) == 0.0


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", LEARNED)
def test_a_rule_survives_its_description(name: str) -> None:
    rule = learned_rule(
        name, features=("loss",), per_tensor=True, free_copy=True, hidden=3, start=Adam(),
        fixed=("update.loss",),
    )  # fmt: skip
    assert rule_from_description(name, json.loads(json.dumps(describe(rule)))) == rule


def test_descriptions_of_older_files_are_understood() -> None:
    about = {"flush": False, "features": ["fisher", "age"], "per_tensor": False, "free_copy": True}
    want = LinearGates("two_levels", False, ("fisher", "age"), False, True)
    assert rule_from_description("two_levels", about) == want
    with pytest.raises(UserError, match="rule mlp: this version does not know depth"):
        rule_from_description("mlp", {"depth": 2})


# ---------------------------------------------------------------- fast = formula


@pytest.mark.parametrize("parts", ["momentum", "square", "per_weight", "per_unit", "gain", "all"])
@pytest.mark.parametrize("flush", [None, 2.0, 900.0])
@pytest.mark.parametrize("features", [(), ("fisher", "loss")])
def test_fast_moments_equal_the_formula(parts: str, flush, features, engine) -> None:
    """Update, and pullback against autograd; with weights that never had a gradient."""
    whole = parts == "all"
    base = tiny_base(("lstm.0.recurrent", *DYNAMIC))
    for r in base.rms.values():
        r.view(-1)[::5] = 0
    rule = LinearGates(
        flush=flush is not None,
        features=features,
        momentum=whole or parts == "momentum",
        square=whole or parts == "square",
        per_weight=whole or parts == "per_weight",
        per_unit=whole or parts == "per_unit",
        gain=whole or parts == "gain",
    )
    phi = _scattered(rule, base)
    if rule.flush:
        phi["flush_scale"].fill_(flush)
    fast, slow = rule.bind(phi, base), ByFormula(rule, phi, base)
    assert isinstance(fast, MomentGates)
    texts = _texts(base, number=3)
    for gradients, _ in texts:
        for g in gradients.values():
            g[1:].flatten(1)[:, ::5] = 0  # where the RMS gradient is zero, and elsewhere
    _assert_fast_equals_formula(fast, slow, texts)


def _assert_fast_equals_formula(fast: Bound, slow: Bound, texts) -> None:
    """Update, and pullback against autograd, in `texts`; nothing that is given is written."""
    weights = lanes_of(fast.start(), 3)
    for gradients, signal in texts:
        before = {n: w.clone() for n, w in weights.items()}
        want = slow.update(weights, gradients, signal)
        want = {n: want[n] for n in weights}
        out = {n: torch.full_like(w, math.nan) for n, w in weights.items()}
        got = fast.update(weights, gradients, signal, out)
        assert all(got[n] is out[n] for n in out)
        _close(got, want, **ROUNDING)
        lam = {n: torch.sin(9 * w + 1) for n, w in weights.items()}
        found, right = (
            b.pullback(weights, gradients, signal, {n: c.clone() for n, c in lam.items()}, 0.3)
            for b in (fast, slow)
        )
        _close(found[0], right[0], rtol=1e-10, atol=1e-12)
        _close(found[1], right[1], rtol=1e-10, atol=1e-12)
        _close(weights, before, rtol=0, atol=0)
        weights = want


@pytest.mark.parametrize("name", ["three_levels", "surprise", "adaptive", "mlp", "lstm"])
@pytest.mark.parametrize("flush", [2.0, 900.0])
def test_two_memories_equal_the_formula(name: str, flush: float, engine) -> None:
    """Each with all that a rule remembers; nothing that is given is written."""
    base = tiny_base(("lstm.0.recurrent", *DYNAMIC))
    rule = dataclasses.replace(_rule(name), slow=True, per_unit=True)
    phi = _scattered(rule, base)
    for part in ("flush_scale", "slow/flush_scale"):
        phi[part].fill_(flush)
    fast, slow = rule.bind(phi, base), ByFormula(rule, phi, base)
    assert isinstance(fast, TwoMemories)
    _assert_fast_equals_formula(fast, slow, _texts(base, number=3))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, and two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_both_memories_in_one_pass_over_many_tiles() -> None:
    """Each as `relax` alone would, the last tile being short; FLUSH clipped here and there."""
    g = torch.Generator().manual_seed(3)
    size = 9 * TILE - 7
    theta, slow, gradient, start, gates, factors = (
        torch.randn(*shape, generator=g).double()
        for shape in [*[(2, size)] * 3, (size,), (4, size), (4, 2)]
    )
    out, new_slow = torch.empty_like(theta), torch.empty_like(theta)
    kernels.share_out(
        kernels.relax_both, kernels.tiles(size), theta.numel(), theta, slow, gradient, start,
        gates, factors, out, new_slow,
    )  # fmt: skip
    both = [(theta - slow, start, 0), (slow, torch.zeros_like(start), 2)]
    near, far = (
        w + (gates[k + 1] * factors[k + 1].unsqueeze(1)).clamp(0, 1) * (to - w)
        - factors[k].unsqueeze(1) * gates[k] * gradient
        for w, to, k in both
    )  # fmt: skip
    torch.testing.assert_close(new_slow, far, **ROUNDING)
    torch.testing.assert_close(out, near + far, **ROUNDING)


def test_a_slow_memory_is_opened_for_training() -> None:
    """Half of every step goes there and is forgotten slowly; what is learned already stays."""
    base, meta = tiny_base(DYNAMIC), MetaConfig(rules=("four_levels",))
    rule, phi = new_rule(meta, "four_levels", LoadedRule(RMS(), _settings("rms"), base))
    other = start_at(rule, RMS(), _settings("rms"), base)
    gradients, signal = _texts(base)[0]
    ends = []
    for parameters in (phi, other):
        bound = rule.bind(parameters, base)
        ends.append(bound.update(lanes_of(bound.start(), 3), gradients, signal))
    for n in DYNAMIC:
        torch.testing.assert_close(ends[0][n], ends[1][n])  # from theta_0 there is no decay yet
        moved = ends[0][n] - base.weights[n]
        torch.testing.assert_close(ends[0][f"{n}/slow"], moved / 2)
        assert not bool(ends[1][f"{n}/slow"].any())
    torch.testing.assert_close(phi["slow/flush_scale"], phi["flush_scale"] / 32)
    again = new_rule(meta, "four_levels", LoadedRule(rule, phi, base))[1]
    _close(again, phi, rtol=0, atol=0)


@pytest.mark.usefixtures("threads")
def test_moments_work_on_tensors_of_many_tiles() -> None:
    """Compiled against tensor operations, the last tile being short."""
    g = torch.Generator().manual_seed(3)
    rms, gradient, s, v, lam, step = (
        torch.randn(*shape, generator=g).double()
        for shape in [(9 * TILE - 7,), *[(2, 9 * TILE - 7)] * 4, (9 * TILE - 7,)]
    )
    mu, a = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.1, 0.4]).double()
    every = Moments("w", momentum=mu, gain=1 - mu, square=a, rms=rms.abs(), eps=2e-5)
    weights = {"w": gradient, "w/momentum": s, "w/square": v.square()}
    found = [_with_moments(every, weights, gradient, lam, step)]
    with kernels.eager():
        found.append(_with_moments(every, weights, gradient, lam, step))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def _with_moments(
    every: Moments, weights, gradient: Tensor, lam: Tensor, step: Tensor
) -> list[Tensor]:
    """All that moments compute, forward and back."""
    out = {n: torch.full_like(w, math.nan) for n, w in weights.items()}
    with every.pushed(weights, gradient, out) as move:
        found = [move.clone(), out["w/momentum"], out["w/square"]]
    cotangent = {n: w.cos() for n, w in weights.items()}
    move, state, sums = every.pull(weights, gradient, lam, step, lam[:, 0], cotangent)
    return [*found, move, *state.values(), sums]


@pytest.mark.parametrize("features", [FEATURES, ("gradient", "distance")])
@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_networks_lane_by_lane_equal_the_formula_of_all_lanes(name: str, features) -> None:
    base = tiny_base(DYNAMIC)
    rule = _rule(name, "adam", features)
    phi = _scattered(rule, base)
    fast, slow = rule.bind(phi, base), ByFormula(rule, phi, base)
    assert isinstance(fast, LaneByLane)
    weights = lanes_of(fast.start(), 3)
    for gradients, signal in _texts(base, number=3):
        want = slow.update(weights, gradients, signal)
        _close(fast.update(weights, gradients, signal), want, rtol=1e-13, atol=1e-15)
        lam = {n: torch.sin(9 * w + 1) for n, w in weights.items()}
        right = slow.pullback(weights, gradients, signal, lam, 0.3)
        found = fast.pullback(weights, gradients, signal, lam, 0.3)
        _close(found[0], right[0], rtol=1e-11, atol=1e-13)
        _close(found[1], right[1], rtol=1e-11, atol=1e-13)
        weights = want


def test_networks_work_on_one_lane_of_one_tensor_at_a_time(monkeypatch) -> None:
    base, rule, seen = tiny_base(DYNAMIC), _rule("lstm"), []
    phi = _scattered(rule, base)

    def spy(self, parameters, base, weights, gradients, signal):
        seen.append({n: len(w) for n, w in weights.items()})
        return plain(self, parameters, base, weights, gradients, signal)

    plain = LinearGates.formula
    monkeypatch.setattr(LinearGates, "formula", spy)
    _read(rule, phi, base)
    wanted = [{n: 1, f"{n}/h": 1, f"{n}/c": 1} for n in DYNAMIC for _ in range(3)]
    assert seen == wanted * 4


@pytest.mark.parametrize("name", LEARNED)
def test_a_lane_without_numbers_never_touches_another(name: str, engine) -> None:
    base, rule = tiny_base(DYNAMIC), _rule(name, "adam")
    bound = rule.bind(_scattered(rule, base), base)
    start = lanes_of(bound.start(), 3)
    gradients, signal = _texts(base)[0]
    clean = bound.update(start, gradients, signal)
    bad = {n: g.clone() for n, g in gradients.items()}
    for g in bad.values():
        g[1] = math.nan
    after = bound.update(start, bad, signal)
    for n in DYNAMIC:
        assert torch.equal(after[n][[0, 2]], clean[n][[0, 2]])
        assert bool(after[n][1].isnan().all())


# ---------------------------------------------------------------- meta-gradients


def _assert_close(got: Parameters, want: Parameters, what: str) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        worst = float((got[name] - value).abs().max())
        assert worst <= PRECISION * float(value.norm()), f"{what}, {name}: {worst}"


def _agree(base, rule, phi, pieces, reader=None) -> MetaGradient:
    """The meta-gradient, after all modes were found to give it; the inputs are never written."""
    bound = rule.bind(phi, base)
    reader = reader or begin(base, 3, bound)
    before = {n: w.clone() for n, w in reader.weights.items()}
    first, *others = (meta_gradient(base, bound, phi, reader, pieces, mode) for mode in MODES)
    for mode, found in zip(MODES[1:], others, strict=True):
        _close(found.reader.weights, first.reader.weights, rtol=0, atol=0)
        _assert_close(found.gradients, first.gradients, mode)
    for n, p in first.gradients.items():
        assert torch.equal(others[0].gradients[n], p), "checkpoint: the very same operations"
    _close(reader.weights, before, rtol=0, atol=0)
    return first


def _against_autograd(base, rule, phi, update, state) -> Parameters:
    pieces = segments(base, LENGTHS, 3, 9)
    assert any(bool(p.new.any()) for p in pieces[1:]), "the test must cross article borders"
    found = _agree(base, rule, phi, pieces)
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    loss, finals = reference.unroll(base, update, leaves, pieces, state=state)
    want = torch.autograd.grad(loss, list(leaves.values()))
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    _assert_close(found.gradients, dict(zip(leaves, want, strict=True)), "autograd")
    for lane, theta in enumerate(finals):
        for n, w in theta.items():
            got = found.reader.weights[n][lane]
            torch.testing.assert_close(got, w.detach(), rtol=1e-11, atol=1e-13)
    return found.gradients


@pytest.mark.parametrize(
    "name", ["tensor_steps", "weight_steps", "unit_steps", "four_levels", "surprise", "adaptive"]
)
def test_gates_on_moments_equal_autograd(name: str, engine) -> None:
    small = {"weight_steps": SMALL, "unit_steps": ("lstm.1.input", *SMALL), "four_levels": SMALL}
    base = tiny_base(small.get(name, DYNAMIC))
    rule = _rule(name)
    update, state = reference.family(base, rule), reference.family_state(base, rule)
    found = _against_autograd(base, rule, _scattered(rule, base), update, state)
    assert all(float(g.norm()) > 1e-7 for g in found.values())


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_networks_equal_autograd(name: str) -> None:
    base = tiny_base(SMALL)
    rule = _rule(name, "adam", ("fisher", "loss", "distance"), hidden=2 if name == "mlp" else 1)
    update, state = reference.family(base, rule), reference.family_state(base, rule)
    found = _against_autograd(base, rule, _scattered(rule, base), update, state)
    assert all(float(g.norm()) > 1e-9 for g in found.values())


@pytest.mark.parametrize(("name", "decay"), [("momentum", 0.05), ("adam", 0.05), ("adam", 1.4)])
def test_rules_with_moments_equal_autograd(name: str, decay: float) -> None:
    base, rule = tiny_base(DYNAMIC), HAND_MADE_RULES[name]
    update, state = reference.moments(base, name), reference.moments_state(base)
    phi = _settings(name, decay=decay)
    found = _against_autograd(base, rule, phi, update, state)
    assert all(float(g.abs()) > 1e-9 for g in found.values())


@pytest.mark.parametrize("name", ["adaptive", "lstm"])
@pytest.mark.parametrize("flush", [0.0, 900.0])
def test_modes_agree_from_where_an_unroll_before_left_the_lanes(name: str, flush: float) -> None:
    """Momentum, moments and hidden states go on; with FLUSH shut, and with FLUSH clipped."""
    base = tiny_base(SMALL)
    rule = _rule(name)
    phi = _scattered(rule, base)
    phi["flush_scale"].fill_(flush)
    pieces = segments(base, LENGTHS, 3, 11)
    bound = rule.bind(phi, base)
    reader = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces[:4]).reader
    assert not bool(pieces[4].new.all())
    found = _agree(base, rule, phi, pieces[4:], reader)
    assert float(found.gradients["flush_scale"].norm()) > 1e-9


@pytest.mark.parametrize("name", LEARNED)
def test_every_part_learns_from_where_it_has_no_effect(name: str) -> None:
    """At the start from RMS all but a network's hidden layers have a gradient, which is finite."""
    base = tiny_base(DYNAMIC)
    rule = _rule(name)
    phi = start_at(rule, RMS(), _settings("rms"), base)
    bound = rule.bind(phi, base)
    pieces = segments(base, LENGTHS, 3, 7)
    found = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces).gradients
    hidden = {n for n in found if n.endswith((".input", ".recurrent"))}
    hidden |= {n for n in found if n.startswith("slow/")} - {"slow/gain"}  # its gain is zero
    for n, g in found.items():
        assert bool(g.isfinite().all()), n
        assert (float(g.norm()) > 1e-9) == (n not in hidden), n


# ---------------------------------------------------------------- tuning


def _repetitive(lanes: int = 2) -> TuneText:
    return TuneText([np.tile([3, 7, 7, 1], 25), np.tile([2, 9], 20)], EOS, lanes)


@pytest.mark.parametrize(
    "budget",
    [1, 2, pytest.param(3, marks=pytest.mark.slow), 8, pytest.param(11, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", HAND_MADE_RULES)
@pytest.mark.parametrize("protocol", ["article", "stream"])
def test_tuning_spends_its_budget_on_different_settings(name, budget: int, protocol: str) -> None:
    base, rule, noted = tiny_base(SMALL), HAND_MADE_RULES[name], []
    trials = tune(base, rule, _repetitive(), protocol, budget, noted.append)
    assert len(noted) == len(trials) == budget
    assert len({tuple(t.setting.values()) for t in trials}) == budget
    assert all(tuple(t.setting) == rule.settings for t in trials)
    assert trials[0].nll == min(t.nll for t in noted)


@pytest.mark.parametrize("segment", [5, 20])
def test_published_settings_are_among_those_tried(segment: int) -> None:
    """Krause's scale with M / 5; Adam has them with its own moments."""
    base = tiny_base(SMALL, segment=segment)
    pace = segment / 5
    krause = {"rate": 5e-5 * pace, "decay": 2e-3 * pace}
    wanted = {"rms": krause, "adam": {**krause, "momentum": 0.9, "square": 1e-3}}
    for name, setting in wanted.items():
        for budget in (1, 2, 8):
            trials = tune(base, HAND_MADE_RULES[name], _repetitive(), "stream", budget)
            close = [t for t in trials if t.setting == pytest.approx(setting, rel=1e-12)]
            assert len(close) == 1, (name, budget)
    tried = [t.setting for t in tune(base, Momentum(), _repetitive(), "stream", 10)]
    assert {0.0, 0.9} <= {setting["momentum"] for setting in tried}
    assert any(s["momentum"] == 0.9 and s["decay"] == pytest.approx(2e-3 * pace) for s in tried)


def test_another_momentum_is_tried_at_the_same_step_size() -> None:
    """The sum of gradients is rate / (1 - momentum) times one that stays the same."""
    base = tiny_base(SMALL)
    noted = []
    tune(base, Momentum(), _repetitive(), "stream", 20, noted.append)
    tried = [(t.setting["momentum"], t.setting["rate"]) for t in noted]
    steps = [rate / (1 - momentum) for momentum, rate in tried]
    first = next(k for k, (momentum, _) in enumerate(tried) if momentum != 0.9)
    assert [momentum for momentum, _ in tried[first : first + 3]] == [0.0, 0.5, 0.98]
    assert any(steps[first] == pytest.approx(step) for step in steps[:first])
    assert steps[first] == pytest.approx(steps[first + 1])
