"""The exact meta-gradient against finite differences of reading itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from worlds import segments, tiny_base

from mlm.models.base import AdaptationBase
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.second_order import second_order
from mlm.reading.step import begin, step
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Parameters, UpdateRule

LENGTHS = (11, 23, 3, 1, 17)
DYNAMIC = ("lstm.0.input", "lstm.1.recurrent", "softmax.bias", "embedding")
EWC = 30.0


def _gates(base: AdaptationBase, flush: bool = True) -> tuple[LinearGates, Parameters]:
    rule = LinearGates(flush=flush, features=("fisher", "loss", "age", "gradient", "distance"))
    phi = rule.start_at_rms(base, 0.05, 0.05)
    g = torch.Generator().manual_seed(4)
    return rule, {n: p + 0.1 * torch.randn(p.shape, generator=g).double() for n, p in phi.items()}


def _objective(
    base: AdaptationBase, rule: UpdateRule, phi: Parameters, pieces, ewc: float
) -> float:
    """Loss of reading, by the fast path, segment by segment; and the penalty."""
    bound = rule.bind(phi, base)
    reader, total, tokens, penalty = begin(base, 3, bound), 0.0, 0, 0.0
    for t, piece in enumerate(pieces):
        now = step(base, bound, reader, piece)
        reader = now.after
        if t:
            total, tokens = total + float(now.scored.nll.sum()), tokens + int(piece.mask.sum())
            for n in base.dynamic:
                away = now.before.weights[n] - base.weights[n]
                penalty += float((base.rms[n].square() * away.square()).sum())
    return total / tokens + 0.5 * ewc * penalty / (3 * (len(pieces) - 1))


def _differences(f, value: Tensor, at: list[int], h: float = 1e-5) -> Tensor:
    """Central differences of f by some entries of `value`, which is moved in place."""
    found, flat = [], value.view(-1)
    for k in at:
        old = float(flat[k])
        flat[k] = old + h
        above = f()
        flat[k] = old - h
        found.append((above - f()) / (2 * h))
        flat[k] = old
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("ewc", [0.0, EWC])
def test_every_gate_parameter_equals_finite_differences(flush: bool, ewc: float) -> None:
    """Borders inside, ragged ends; the first order is measurably another number."""
    base = tiny_base(DYNAMIC)
    pieces = segments(base, LENGTHS, 3, 5)
    rule, phi = _gates(base, flush)
    exact = second_order(base, rule, phi, begin(base, 3), pieces, ewc=ewc)
    bound = rule.bind(phi, base)
    first = meta_gradient(base, bound, phi, begin(base, 3), pieces, ewc=ewc)
    assert exact.loss == pytest.approx(first.loss, rel=1e-12)
    worst = 0.0
    for name, p in phi.items():
        at = list(range(0, p.numel(), 3))
        want = _differences(lambda: _objective(base, rule, phi, pieces, ewc), p, at)
        got = exact.gradients[name].view(-1)[at]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
        worst = max(worst, float((first.gradients[name].view(-1)[at] - want).abs().max()))
    assert worst > 1e-4, "nothing that the first order leaves out"
    for name, w in first.reader.weights.items():
        torch.testing.assert_close(exact.reader.weights[name], w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lstm.1.recurrent", "softmax.bias", "lstm.0.bias", "embedding"])
def test_theta_0_and_shared_weights_equal_finite_differences(name: str) -> None:
    """A dynamic weight's start, a weight that all lanes share, and the tied embedding."""
    base = tiny_base(("lstm.1.recurrent", "softmax.bias", "lstm.0.input"))
    pieces = segments(base, LENGTHS, 3, 4)
    rule, phi = _gates(base)
    found = second_order(base, rule, phi, begin(base, 3), pieces, learn=(name,))
    value = base.weights[name]
    at = list(range(0, value.numel(), max(1, value.numel() // 5)))

    def loss() -> float:
        home = dataclasses.replace(base, weights={**base.weights, name: value})
        return _objective(home, rule, phi, pieces, 0.0)

    want = _differences(loss, value, at)
    torch.testing.assert_close(found.weights[name].view(-1)[at], want, rtol=1e-5, atol=1e-8)
    assert float(want.abs().max()) > 1e-4


def test_persistent_state_is_a_constant() -> None:
    """An unroll that continues another starts from its weights, state and age."""
    base = tiny_base(DYNAMIC)
    pieces = segments(base, LENGTHS, 3, 6)
    rule, phi = RMS(), {"rate": torch.tensor(0.05).double(), "decay": torch.tensor(0.2).double()}
    half = second_order(base, rule, phi, begin(base, 3), pieces[:3])
    rest = second_order(base, rule, phi, half.reader, pieces[3:])
    bound = rule.bind(phi, base)
    want = meta_gradient(base, bound, phi, half.reader, pieces[3:])
    assert rest.loss == pytest.approx(want.loss, rel=1e-12)
    assert torch.equal(rest.reader.age, want.reader.age)
    assert not any(w.requires_grad for w in rest.reader.weights.values())
