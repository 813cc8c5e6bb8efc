"""Training theta_0 and shared weights through the adaptation, and the EWC penalty: first order."""

from __future__ import annotations

import dataclasses

import pytest
import reference
import torch
from worlds import segments, tiny_base

from mlm.reading.meta_gradient import GradientMode, meta_gradient
from mlm.reading.step import begin, step
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS

LENGTHS = (11, 23, 3, 1, 17)
DYNAMIC = ("lstm.0.input", "lstm.1.recurrent", "softmax.bias")
MODES: tuple[GradientMode, ...] = ("reverse", "checkpoint", "forward")


def _gates(base, features=("fisher", "loss", "age"), flush: bool = True):
    rule = LinearGates(flush=flush, features=features)
    phi = rule.start_at_rms(base, 0.02, 0.05)
    g = torch.Generator().manual_seed(4)
    phi = {n: p + 0.1 * torch.randn(p.shape, generator=g).double() for n, p in phi.items()}
    return rule, phi


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("tied", ["shared", "dynamic"])
def test_every_weight_of_the_model_equals_hand_unrolled_autograd(mode, flush, tied) -> None:
    """theta_0 of dynamic tensors and shared tensors alike; the tied embedding is one weight."""
    base = tiny_base((*DYNAMIC, "embedding") if tied == "dynamic" else DYNAMIC)
    pieces = segments(base, LENGTHS, 3, 8)
    assert any(bool(p.new.any()) for p in pieces[1:]), "the test must cross article borders"
    rule, phi = _gates(base, flush=flush)
    names = tuple(base.weights)
    found = meta_gradient(
        base, rule.bind(phi, base), phi, begin(base, 3), pieces, mode, learn=names
    )
    leaves = {n: w.clone().requires_grad_() for n, w in base.weights.items()}
    home = dataclasses.replace(base, weights=leaves)
    loss, _ = reference.unroll(home, reference.gates(base, rule), phi, pieces)
    want = torch.autograd.grad(loss, list(leaves.values()))
    for name, g in zip(names, want, strict=True):
        assert float(g.abs().max()) > 1e-6, f"{name}: nothing to compare"
        torch.testing.assert_close(found.weights[name], g, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("features", [("fisher", "loss", "age"), ("fisher", "distance")])
def test_the_penalty_equals_autograd_through_the_same_updates(features) -> None:
    """Gradients and signals as constants; the penalty grows with the distance from theta_0."""
    base = tiny_base(DYNAMIC)
    pieces = segments(base, LENGTHS, 3, 9)
    rule, phi = _gates(base, features)
    bound, ewc = rule.bind(phi, base), 50.0
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    reader, theta = begin(base, 3), begin(base, 3).weights
    penalty = torch.zeros((), dtype=torch.float64)
    for t, piece in enumerate(pieces):
        now = step(base, bound, reader, piece)
        reader = now.after
        flag = now.new.view(-1, 1)
        for n, w in theta.items():
            shaped = flag.view(-1, *[1] * (w.dim() - 1))
            theta[n] = torch.where(shaped, base.weights[n], w)
            if t:
                away = theta[n] - base.weights[n]
                penalty = penalty + (base.rms[n].square() * away.square()).sum()
        theta = rule.formula(leaves, base, theta, now.scored.gradients, now.signal)
    penalty = 0.5 * ewc * penalty / (3 * 8)
    want = torch.autograd.grad(penalty, list(leaves.values()))
    for mode in MODES:
        reader = begin(base, 3)
        with_it = meta_gradient(base, bound, phi, reader, pieces, mode, ewc=ewc)
        without = meta_gradient(base, bound, phi, reader, pieces, mode)
        assert with_it.loss == without.loss
        for (name, g), expected in zip(with_it.gradients.items(), want, strict=True):
            assert float(expected.abs().max()) > 1e-6, f"{name}: nothing to compare"
            torch.testing.assert_close(g - without.gradients[name], expected, rtol=1e-8, atol=1e-11)


def test_lanes_share_what_their_weights_owe() -> None:
    """A hand-made rule, and an unroll that continues another: the distance is carried along."""
    base = tiny_base(DYNAMIC)
    pieces = segments(base, (90, 90), 2, 6)
    values = {"rate": torch.tensor(0.03).double(), "decay": torch.tensor(0.1).double()}
    bound = RMS().bind(values, base)
    start = meta_gradient(base, bound, values, begin(base, 2), pieces[:3]).reader
    name = "lstm.1.recurrent"
    found = meta_gradient(base, bound, values, start, pieces[3:], learn=(name,))

    def first_order(shift: torch.Tensor) -> float:
        """<sum of the lanes' gradients of the counted segments, shift>."""
        total, reader = 0.0, start
        for t, piece in enumerate(pieces[3:]):
            now = step(base, bound, reader, piece)
            reader = now.after
            if t:
                total += float((now.scored.gradients[name] * shift).sum())
        return total * base.segment / found.tokens

    shift = torch.randn(base.weights[name].shape, dtype=torch.float64)
    assert float((found.weights[name] * shift).sum()) == pytest.approx(first_order(shift), rel=1e-9)
