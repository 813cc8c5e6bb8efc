"""Three ways to one meta-gradient: equal to each other, to autograd and to a training resumed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from worlds import EOS, articles, segments, tiny_base

from mlm.kernels import buffers
from mlm.models.base import AdaptationBase, lanes_of
from mlm.reading.meta_gradient import GradientMode, MetaGradient, meta_gradient
from mlm.reading.step import begin
from mlm.rules.gates import LANE, FastGates, LinearGates
from mlm.rules.hand_made import RMS, SGD
from mlm.rules.protocol import Bound, ByFormula, Parameters, Signal
from mlm.settings.sections import MetaConfig
from mlm.store.run_folder import RunFolder
from mlm.text.streams import Text
from mlm.training.meta import MetaTrainer

MODES: tuple[GradientMode, ...] = ("reverse", "checkpoint", "forward")
LENGTHS = (11, 23, 3, 1, 17)
"""Articles that end inside a segment, one shorter than a segment, one of a single token."""
DYNAMIC = ("lstm.0.input", "lstm.1.recurrent", "softmax.bias", "embedding")
LANE_SETS = [(), ("fisher",), ("loss",), ("fisher", "age"), ("fisher", "loss", "age")]
SCALES = (None, 2.0, 0.0, -2.0, 900.0)
ALL = ("fisher", "loss", "age", "gradient", "distance")
PRECISION = 1e-10
"""Largest difference over the norm of a parameter's gradient: float64 sums in another order."""


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are used again too: nobody may still need what is given away."""
    monkeypatch.setattr(buffers, "MIN_BYTES", 0)
    yield
    buffers.clear()


def _parameters(base: AdaptationBase, rule: LinearGates, scale: float | None = None) -> Parameters:
    """Gates near a known good rule, every number different; `scale` replaces FLUSH's."""
    start = rule.start_at_sgd(base, 0.02)
    if "fisher" in rule.features:
        start = rule.start_at_rms(base, 0.02, 0.05)
    g = torch.Generator().manual_seed(4)
    phi = {n: p + 0.1 * torch.randn(p.shape, generator=g).double() for n, p in start.items()}
    if scale is not None and rule.flush:
        phi["flush_scale"] = torch.full_like(phi["flush_scale"], scale)
    return phi


def _hand_made(rule: SGD | RMS, base: AdaptationBase, rate: float, decay: float) -> Parameters:
    values = {"rate": rate} if isinstance(rule, SGD) else {"rate": rate, "decay": decay}
    like = next(iter(base.rms.values()))
    return {n: like.new_tensor(v) for n, v in values.items()}


def _assert_close(got: Parameters, want: Parameters, what: str) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        worst = float((got[name] - value).abs().max())
        assert worst <= PRECISION * float(value.norm()), f"{what}, {name}: {worst}"


def _agree(base, bound: Bound, phi: Parameters, reader, pieces) -> MetaGradient:
    """The meta-gradient, after all modes were found to give it; the inputs are never written."""
    before = {n: w.clone() for n, w in reader.weights.items()}
    first, *others = (meta_gradient(base, bound, phi, reader, pieces, mode) for mode in MODES)
    for mode, found in zip(MODES[1:], others, strict=True):
        assert (found.loss, found.tokens) == (first.loss, first.tokens)
        assert torch.equal(found.reader.age, first.reader.age)
        for n, w in first.reader.weights.items():
            assert torch.equal(found.reader.weights[n], w)
        states = found.reader.state.tensors(), first.reader.state.tensors()
        assert all(torch.equal(x, y) for x, y in zip(*states, strict=True))
        _assert_close(found.gradients, first.gradients, mode)
    for n, p in first.gradients.items():
        assert torch.equal(others[0].gradients[n], p), "checkpoint: the very same operations"
    assert all(torch.equal(reader.weights[n], w) for n, w in before.items())
    return first


def _pieces(base: AdaptationBase, number: int = 13, lanes: int = 3):
    """Segments with article borders inside and ragged ends; 13 = blocks of 3, the last of 1."""
    pieces = segments(base, LENGTHS, lanes, number)
    assert any(bool(p.new.any()) for p in pieces[1:]), "the test must cross article borders"
    assert any(0 < int(m) < base.segment for p in pieces for m in p.mask.sum(1))
    return pieces


# ---------------------------------------------------------------- equal to each other


def _fast_gates() -> Iterator[Any]:
    """Features, scale, engine: all of the first two with one engine, with the other as `slow`.

    With either engine there are gates per tensor and gates for all.
    """
    for (f, features), (s, scale) in itertools.product(enumerate(LANE_SETS), enumerate(SCALES)):
        usual, other = ("compiled", "eager") if (f + s) % 4 in (0, 3) else ("eager", "compiled")
        yield pytest.param(features, scale, usual)
        yield pytest.param(features, scale, other, marks=pytest.mark.slow)


@pytest.mark.parametrize(("features", "scale", "engine"), [*_fast_gates()], indirect=["engine"])
def test_modes_agree_for_fast_gates(features, scale: float | None, engine) -> None:
    """None = no FLUSH; 0 and below: FLUSH shut; 900: many a gate is clipped.

    Gates per tensor are tried with one engine, gates for all with the other, in turns.
    """
    turn = LANE_SETS.index(features) + SCALES.index(scale) + (engine == "eager")
    base, per_tensor = tiny_base(DYNAMIC), turn % 2 == 0
    rule = LinearGates(flush=scale is not None, features=features, per_tensor=per_tensor)
    phi = _parameters(base, rule, scale)
    bound = rule.bind(phi, base)
    assert isinstance(bound, FastGates)
    found = _agree(base, bound, phi, begin(base, 3), _pieces(base)).gradients
    assert bool((found["update"].abs() > 1e-9).all())
    if scale in (0.0, 2.0) or (scale == 900 and "fisher" in features):
        assert float(found["flush_scale"].norm()) > 1e-9, "nothing to compare"
        assert (float(found["flush"].norm()) > 1e-9) == (scale != 0)


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize(
    ("features", "free_copy"),
    [(ALL, True), (ALL, False), (("fisher", "loss"), True), (("fisher", "distance"), False)],
)
def test_modes_agree_for_the_other_gates(features, free_copy: bool, flush: bool) -> None:
    """Features of single weights, and COPY apart: the rule differentiates its formula."""
    base = tiny_base(DYNAMIC[1:3])
    rule = LinearGates(flush=flush, features=features, free_copy=free_copy, per_tensor=False)
    phi = _parameters(base, rule)
    bound = rule.bind(phi, base)
    assert type(bound) is ByFormula
    _agree(base, bound, phi, begin(base, 3), _pieces(base, 9))


@pytest.mark.parametrize(("rule", "decay"), [(SGD(), 0.0), (RMS(), 0.1), (RMS(), 3.0)])
def test_modes_agree_for_hand_made_rules(rule: SGD | RMS, decay: float) -> None:
    """Decay 3: clipped where the RMS gradient is large. Settings may differ from lane to lane."""
    base = tiny_base(DYNAMIC)
    phi = _hand_made(rule, base, 0.03, decay)
    for values in (phi, {n: p * torch.tensor([1.0, 0.5, 2.0]).double() for n, p in phi.items()}):
        bound = rule.bind(values, base)
        found = _agree(base, bound, values, begin(base, 3), _pieces(base)).gradients
        assert all(bool((g.abs() > 1e-9).all()) for g in found.values())


@pytest.mark.parametrize("updates", [1, 2, 3, 4, 5, 30])
def test_modes_agree_for_any_length(updates: int) -> None:
    """One update has no meta-loss; snapshots lie where they may."""
    base = tiny_base(DYNAMIC)
    rule = LinearGates()
    phi = _parameters(base, rule)
    pieces = segments(base, LENGTHS, 2, updates)
    bound = rule.bind(phi, base)
    if updates > 1:
        assert _agree(base, bound, phi, begin(base, 2), pieces).tokens > 0
        return
    for mode in MODES:
        found = meta_gradient(base, bound, phi, begin(base, 2), pieces, mode)
        assert found.loss != found.loss
        assert found.tokens == 0
        assert all(float(g.abs().sum()) == 0 for g in found.gradients.values())
        assert found.reader.age.tolist() == [1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_reader_is_left_alone(mode: GradientMode) -> None:
    """Its weights are the oldest of the unroll, and no memory for anybody else."""
    base = tiny_base(DYNAMIC)
    rule = LinearGates()
    phi = _parameters(base, rule)
    bound, pieces = rule.bind(phi, base), segments(base, (90, 90), 2, 9)
    reader = meta_gradient(base, bound, phi, begin(base, 2), pieces[:3]).reader
    before = {n: w.clone() for n, w in reader.weights.items()}
    first, again = (
        meta_gradient(base, bound, phi, reader, pieces[3:], mode).gradients for _ in range(2)
    )
    for name, weights in reader.weights.items():
        assert torch.equal(weights, before[name])
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name])


def test_lanes_add_up() -> None:
    """The forward gradient of three lanes is the token-weighted sum of theirs one by one."""
    base = tiny_base(DYNAMIC)
    rule = LinearGates()
    phi = _parameters(base, rule)
    bound, pieces = rule.bind(phi, base), _pieces(base)
    whole = meta_gradient(base, bound, phi, begin(base, 3), pieces, "forward")
    total = {n: torch.zeros_like(p) for n, p in phi.items()}
    for lane in range(3):
        own = [
            p._replace(
                inputs=p.inputs[lane : lane + 1],
                targets=p.targets[lane : lane + 1],
                mask=p.mask[lane : lane + 1],
                new=p.new[lane : lane + 1],
            )
            for p in pieces
        ]
        one = meta_gradient(base, bound, phi, begin(base, 1), own, "forward")
        for n, g in one.gradients.items():
            total[n] += g * one.tokens / whole.tokens
    _assert_close(whole.gradients, total, "lanes")


# ---------------------------------------------------------------- equal to autograd


def _against_autograd(base, bound, update, phi, pieces, reader=None) -> dict[str, torch.Tensor]:
    found = _agree(base, bound, phi, reader or begin(base, 3), pieces)
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    loss, finals = reference.unroll(base, update, leaves, pieces, reader)
    want = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    full = {
        n: torch.zeros_like(phi[n]) if g is None else g for n, g in zip(leaves, want, strict=True)
    }
    _assert_close(found.gradients, full, "autograd")
    for lane, theta in enumerate(finals):
        for n, w in theta.items():
            got = found.reader.weights[n][lane]
            torch.testing.assert_close(got, w.detach(), rtol=1e-11, atol=1e-13)
    return full


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("scale", [None, 50.0, 0.0, 900.0])
def test_fast_gates_equal_autograd(persistent: bool, scale, engine) -> None:
    """From theta_0, and from where an unroll before left the readers."""
    base, per_tensor = tiny_base(DYNAMIC), persistent == (engine == "compiled")
    rule = LinearGates(flush=scale is not None, per_tensor=per_tensor)
    phi = _parameters(base, rule, scale)
    bound, pieces, reader = rule.bind(phi, base), _pieces(base, 12), None
    if persistent:
        reader = meta_gradient(base, bound, phi, begin(base, 3), pieces[:4]).reader
        pieces = pieces[4:]
        assert not bool(pieces[0].new.all())
    full = _against_autograd(base, bound, reference.gates(base, rule), phi, pieces, reader)
    assert float(full["update"].abs().min()) > 1e-9
    if scale == 900:
        clipped = [
            rule.gates(phi, base, n, w[None], w[None], _signal(2))[2] >= 1
            for n, w in base.start().items()
        ]
        assert any(bool(z.any()) and not bool(z.all()) for z in clipped), "some, not all"


def _signal(lanes: int) -> Signal:
    return Signal(torch.full((lanes,), 2.0).double(), torch.zeros(lanes).double())


@pytest.mark.parametrize("scale", [1000.0, 0.0])
def test_a_flush_exactly_at_its_clip_still_has_a_derivative(scale: float) -> None:
    """z = 1 or z = 0 to the last bit: clamp passes the gradient, and so do all modes."""
    base = tiny_base(("softmax.bias", "lstm.1.recurrent"))
    rule = LinearGates(features=("loss", "age"))
    phi = _parameters(base, rule, scale)
    phi["flush"].zero_()
    bound, pieces = rule.bind(phi, base), _pieces(base, 8)
    theta = base.weights["softmax.bias"].unsqueeze(0)
    z = rule.gates(phi, base, "softmax.bias", theta, theta, _signal(1))[2]
    assert bool((z == scale / 1000).all())
    full = _against_autograd(base, bound, reference.gates(base, rule), phi, pieces)
    assert bool((full["flush_scale"].abs() > 1e-10).all())


@pytest.mark.parametrize(("features", "free_copy"), [(ALL, False), (ALL, True), (("loss",), True)])
def test_other_gates_equal_autograd(features, free_copy: bool) -> None:
    base = tiny_base(DYNAMIC[1:3])
    rule = LinearGates(features=features, free_copy=free_copy)
    phi = _parameters(base, rule)
    update = reference.gates(base, rule)
    _against_autograd(base, rule.bind(phi, base), update, phi, _pieces(base, 7))


@pytest.mark.parametrize(("rule", "decay"), [(SGD(), 0.0), (RMS(), 0.1), (RMS(), 3.0)])
def test_hand_made_rules_equal_autograd(rule: SGD | RMS, decay: float) -> None:
    base = tiny_base(DYNAMIC)
    phi = _hand_made(rule, base, 0.03, decay)
    update = reference.hand_made(base, rule.name)
    _against_autograd(base, rule.bind(phi, base), update, phi, _pieces(base, 8))


@pytest.mark.parametrize("features", LANE_SETS)
@pytest.mark.parametrize("scale", [None, 2.0, 0.0, 900.0])
def test_one_fast_step_of_the_tangent_equals_the_formula(
    features, scale: float | None, engine
) -> None:
    """From a random tangent: copies of the constant and of lane features, and what is added."""
    base = tiny_base(DYNAMIC[:2])
    rule = LinearGates(flush=scale is not None, features=features)
    phi = _parameters(base, rule, scale)
    fast, slow = rule.bind(phi, base), ByFormula(rule, phi, base)
    g = torch.Generator().manual_seed(1)

    def noise(like):
        return {n: 0.1 * torch.randn(w.shape, generator=g).double() for n, w in like.items()}

    start = lanes_of(base.start(), 2)
    theta = {n: w + d for (n, w), d in zip(start.items(), noise(start).values(), strict=True)}
    gradient, signal = noise(start), Signal(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 7.0]))
    signal = Signal(signal.loss.double(), signal.age.double())
    columns = ("one", *(f for f in LANE if f in features))
    kinds = ("update", "flush") if rule.flush else ("update",)
    tangent = noise(fast.tangent(2))
    assert all(len(s) == len(kinds) * len(columns) for s in tangent.values())
    full = slow.tangent(2)
    for group, name in enumerate(base.dynamic):
        for (k, kind), (c, column) in itertools.product(enumerate(kinds), enumerate(columns)):
            copy = tangent[name][k * len(columns) + c] * (scale if k and scale is not None else 1)
            full[name][_number(phi, kind, group, rule.columns[column])] = copy
            if "fisher" in features and column == "one":
                at = _number(phi, kind, group, rule.columns["fisher"])
                full[name][at] = copy * rule.fisher(base, name, kind)
        if rule.flush:
            full[name][_number(phi, "flush_scale", group)] = tangent[name][len(columns)]
    got, want = ({n: torch.ones_like(p) for n, p in phi.items()} for _ in range(2))
    fast.advance(theta, gradient, signal, tangent, got)
    slow.advance(theta, gradient, signal, full, want)
    _assert_close(got, want, "found")
    for group, name in enumerate(base.dynamic):
        for (k, kind), (c, column) in itertools.product(enumerate(kinds), enumerate(columns)):
            copy = tangent[name][k * len(columns) + c] * (scale if k and scale is not None else 1)
            want = full[name][_number(phi, kind, group, rule.columns[column])]
            torch.testing.assert_close(copy, want, rtol=1e-11, atol=1e-14)


def _number(phi: Parameters, kind: str, *at: int) -> int:
    """Position of one number among all of the parameters."""
    before = sum(p.numel() for p in itertools.takewhile(lambda p: p is not phi[kind], phi.values()))
    return before + int(torch.arange(phi[kind].numel()).view(phi[kind].shape)[at])


# ---------------------------------------------------------------- training


def _trainer(mode: GradientMode) -> MetaTrainer:
    base = tiny_base(DYNAMIC)
    rule = LinearGates()
    text = Text(articles((60, 35, 80, 50)), 225, EOS)
    settings = dataclasses.replace(MetaConfig(), lanes=3, unroll=7, steps=4, gradient=mode)
    return MetaTrainer(base, rule, rule.start_at_rms(base, 0.02, 0.05), text, settings, 0)


@pytest.mark.parametrize("mode", MODES)
def test_training_uses_the_mode_and_resumes_bit_for_bit(mode, tmp_path, monkeypatch) -> None:
    called = []

    def spy(*words):
        called.append(words[5])
        return meta_gradient(*words)

    monkeypatch.setattr("mlm.training.meta.meta_gradient", spy)
    whole, half, rest = (_trainer(mode) for _ in range(3))
    losses = [whole.train_step()[0] for _ in range(4)]
    parts = [half.train_step()[0] for _ in range(2)]
    half.save(RunFolder(tmp_path), "mark")
    rest.load(RunFolder(tmp_path), "mark")
    parts += [rest.train_step()[0] for _ in range(2)]
    assert called == [mode] * 8
    assert losses == parts
    for n, p in whole.parameters.items():
        assert torch.equal(p, rest.parameters[n])
    reverse = _trainer("reverse")
    assert [reverse.train_step()[0] for _ in range(4)] == pytest.approx(losses, rel=1e-9)
