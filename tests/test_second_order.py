"""The exact meta-gradient against finite differences of reading itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from worlds import segments, tiny_memory

from mlm.gates import LinearGates
from mlm.learner import RMS, Parameters, UpdateRule
from mlm.memory import LongTerm
from mlm.rollout import begin, meta_gradient, step
from mlm.second_order import second_order

LENGTHS = (11, 23, 3, 1, 17)
DYNAMIC = ("lstm.0.input", "lstm.1.recurrent", "softmax.bias", "embedding")
EWC = 30.0


def _gates(memory: LongTerm, flush: bool = True) -> tuple[LinearGates, Parameters]:
    rule = LinearGates(flush=flush, features=("fisher", "loss", "age", "gradient", "distance"))
    phi = rule.start_at_rms(memory, 0.05, 0.05)
    g = torch.Generator().manual_seed(4)
    return rule, {n: p + 0.1 * torch.randn(p.shape, generator=g).double() for n, p in phi.items()}


def _objective(memory: LongTerm, rule: UpdateRule, phi: Parameters, pieces, ewc: float) -> float:
    """Loss of reading, by the fast path, segment by segment; and the penalty."""
    bound = rule.bind(phi, memory)
    reader, total, tokens, penalty = begin(memory, 3, bound), 0.0, 0, 0.0
    for t, piece in enumerate(pieces):
        now = step(memory, bound, reader, piece)
        reader = now.after
        if t:
            total, tokens = total + float(now.scored.nll.sum()), tokens + int(piece.mask.sum())
            for n in memory.dynamic:
                away = now.before.weights[n] - memory.weights[n]
                penalty += float((memory.rms[n].square() * away.square()).sum())
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
    memory = tiny_memory(DYNAMIC)
    pieces = segments(memory, LENGTHS, 3, 5)
    rule, phi = _gates(memory, flush)
    exact = second_order(memory, rule, phi, begin(memory, 3), pieces, ewc=ewc)
    bound = rule.bind(phi, memory)
    first = meta_gradient(memory, bound, phi, begin(memory, 3), pieces, ewc=ewc)
    assert exact.loss == pytest.approx(first.loss, rel=1e-12)
    worst = 0.0
    for name, p in phi.items():
        at = list(range(0, p.numel(), 3))
        want = _differences(lambda: _objective(memory, rule, phi, pieces, ewc), p, at)
        got = exact.gradients[name].view(-1)[at]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
        worst = max(worst, float((first.gradients[name].view(-1)[at] - want).abs().max()))
    assert worst > 1e-4, "nothing that the first order leaves out"
    for name, w in first.reader.weights.items():
        torch.testing.assert_close(exact.reader.weights[name], w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lstm.1.recurrent", "softmax.bias", "lstm.0.bias", "embedding"])
def test_theta_0_and_shared_weights_equal_finite_differences(name: str) -> None:
    """A dynamic weight's start, a weight that all lanes share, and the tied embedding."""
    memory = tiny_memory(("lstm.1.recurrent", "softmax.bias", "lstm.0.input"))
    pieces = segments(memory, LENGTHS, 3, 4)
    rule, phi = _gates(memory)
    found = second_order(memory, rule, phi, begin(memory, 3), pieces, learn=(name,))
    value = memory.weights[name]
    at = list(range(0, value.numel(), max(1, value.numel() // 5)))

    def loss() -> float:
        home = dataclasses.replace(memory, weights={**memory.weights, name: value})
        return _objective(home, rule, phi, pieces, 0.0)

    want = _differences(loss, value, at)
    torch.testing.assert_close(found.weights[name].view(-1)[at], want, rtol=1e-5, atol=1e-8)
    assert float(want.abs().max()) > 1e-4


def test_persistent_state_is_a_constant() -> None:
    """An unroll that continues another starts from its weights, state and age."""
    memory = tiny_memory(DYNAMIC)
    pieces = segments(memory, LENGTHS, 3, 6)
    rule, phi = RMS(), {"rate": torch.tensor(0.05).double(), "decay": torch.tensor(0.2).double()}
    half = second_order(memory, rule, phi, begin(memory, 3), pieces[:3])
    rest = second_order(memory, rule, phi, half.reader, pieces[3:])
    bound = rule.bind(phi, memory)
    want = meta_gradient(memory, bound, phi, half.reader, pieces[3:])
    assert rest.loss == pytest.approx(want.loss, rel=1e-12)
    assert torch.equal(rest.reader.age, want.reader.age)
    assert not any(w.requires_grad for w in rest.reader.weights.values())
