"""The engine against its slow reference, in float64: outputs, final state, every gradient."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import reference
import torch
from worlds import tiny_base

from mlm.kernels.bfloat16 import bfloat16_products
from mlm.models import recurrence
from mlm.models.base import lanes_of
from mlm.models.output_layer import token_nll
from mlm.models.recurrence import LaneRecurrence, lane_lstm
from mlm.models.recurrent import (
    Dropout,
    RecurrentLM,
    RecurrentState,
    initial_state,
    initial_weights,
    run_lstm,
    score,
)

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12}
"""A few hundred float64 operations of size one: rounding stays below 1e-13."""


def _random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_that_leave_the_cache_are_read_in_bfloat16(engine: str, monkeypatch: Any) -> None:
    """Where products are made so; then outputs and gradients are those of the rounded weights."""
    monkeypatch.setattr(recurrence, "_OWN_CACHE_BYTES", 4 * 48 * 12 - 1)
    lanes, steps, hidden = 3, 7, 12
    shapes = ((lanes, steps, 48), (lanes, 48, hidden), (lanes, hidden), (lanes, hidden))
    gates, own, h, c = (_random(*shape, seed=k).float() * 0.5 for k, shape in enumerate(shapes))

    def read(recurrent: torch.Tensor, lower: bool) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (gates, h, c)]
        with bfloat16_products(lower):
            out = LaneRecurrence.apply(inputs[0], recurrent, *inputs[1:])
            total = torch.stack([(a.sin() * (k + 1)).sum() for k, a in enumerate(out)]).sum()
            return [*out, *torch.autograd.grad(total, inputs)]

    found, exact = read(own, True), read(own, False)
    for got, want, plain in zip(found, read(own.bfloat16().float(), False), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(got, plain, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(recurrence, "_OWN_CACHE_BYTES", 4 * 48 * 12)
    for got, want in zip(read(own, True), exact, strict=True):
        assert torch.equal(got, want), "these stay in the cache"


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("own", ["none", "all", "recurrent", "bias"])
def test_lane_lstm_equals_plain_loop(own: str, lanes: int, steps: int, engine, monkeypatch) -> None:
    size, hidden = 4, 5
    monkeypatch.setattr(recurrence, "CACHE_BYTES", 2 * 4 * hidden * hidden * 8)  # blocks of 2 lanes
    shapes = {"input": (4 * hidden, size), "recurrent": (4 * hidden, hidden), "bias": (4 * hidden,)}
    weights = [
        _random(*((lanes,) if own in ("all", name) else ()), *shape, seed=k) * 0.5
        for k, (name, shape) in enumerate(shapes.items())
    ]
    data = [_random(lanes, steps, size, seed=7), *(_random(lanes, hidden, seed=s) for s in (8, 9))]
    inputs = [t.requires_grad_() for t in (*weights, *data)]
    y, h, c = lane_lstm(data[0], (weights[0], weights[1], weights[2]), data[1], data[2])
    rows = []
    for lane in range(lanes):
        names = [f"lstm.0.{n}" for n in shapes]
        mine = [
            w[lane] if w.dim() > len(s) else w
            for w, s in zip(weights, shapes.values(), strict=True)
        ]
        state, out = (data[1][lane], data[2][lane]), []
        for t in range(steps):
            own_weights = dict(zip(names, mine, strict=True))
            state = reference.lstm_step(own_weights, 0, data[0][lane, t], *state)
            out.append(state[0])
        rows.append((torch.stack(out), *state))
    expected = [torch.stack(part) for part in zip(*rows, strict=True)]
    for got, want in zip((y, h, c), expected, strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    objective = [(a.sin() * (k + 1)).sum() for k, a in enumerate((y, h, c))]
    wanted = [(a.sin() * (k + 1)).sum() for k, a in enumerate(expected)]
    got_g = torch.autograd.grad(torch.stack(objective).sum(), inputs)
    want_g = torch.autograd.grad(torch.stack(wanted).sum(), inputs)
    for got, want in zip(got_g, want_g, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def _lanes_state(base, lanes: int) -> RecurrentState:
    zero = initial_state(base.model, lanes, dtype=torch.float64)
    return RecurrentState(
        tuple(_random(*h.shape, seed=k) for k, h in enumerate(zero.h)),
        tuple(_random(*c.shape, seed=9 + k) for k, c in enumerate(zero.c)),
    )


@pytest.mark.parametrize("cutoffs", [(), (5,), (4, 9)])
@pytest.mark.parametrize(
    "dynamic", [(), ("softmax.bias",), ("lstm.0.recurrent",), ("embedding",), None]
)
def test_score_equals_reference(dynamic, cutoffs, engine) -> None:
    """Loss, state and gradient of every lane's own weights, for any choice of dynamic weights."""
    base, lanes = tiny_base(dynamic, cutoffs=cutoffs), 3
    own = lanes_of(base.start(), lanes)
    own = {n: (w + 0.1 * _random(*w.shape, seed=k)) for k, (n, w) in enumerate(own.items())}
    leaves = {n: w.requires_grad_() for n, w in own.items()}
    ids = torch.randint(12, (lanes, 6), generator=torch.Generator().manual_seed(1))
    targets = torch.randint(12, (lanes, 6), generator=torch.Generator().manual_seed(2))
    state = _lanes_state(base, lanes)
    nll, after = score({**base.weights, **leaves}, base.model, ids, targets, state)
    losses, hs = [], []
    for b in range(lanes):
        w = {**base.weights, **{n: v[b] for n, v in leaves.items()}}
        h, c = [x[b] for x in state.h], [x[b] for x in state.c]
        loss, h, c = reference.read_lane(w, base.model, ids[b].tolist(), targets[b].tolist(), h, c)
        losses.append(loss)
        hs.append(torch.cat([*h, *c]))
    torch.testing.assert_close(nll, torch.stack(losses), **EXACT)
    torch.testing.assert_close(torch.cat([*after.h, *after.c], 1), torch.stack(hs), **EXACT)
    if not leaves:
        return
    got = torch.autograd.grad(nll.sum(), list(leaves.values()))
    want = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cutoffs", [(), (5,), (4, 9)])
def test_probabilities_sum_to_one(cutoffs) -> None:
    base = tiny_base((), cutoffs=cutoffs)
    output = _random(1, 1, 4).expand(12, 1, 4)
    nll = token_nll(base.weights, base.model, output, torch.arange(12).unsqueeze(1))
    assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_fused_kernel_equals_lanes_of_equal_weights() -> None:
    """Static scoring (library kernel) and per-lane scoring of the same weights agree."""
    base = tiny_base(None)
    ids = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(1))
    state = _lanes_state(base, 3)
    shared, _ = score(base.weights, base.model, ids, ids, state)
    lanes, _ = score(lanes_of(base.weights, 3), base.model, ids, ids, state)
    torch.testing.assert_close(shared, lanes, **EXACT)


@pytest.mark.parametrize("cell", ["lstm", "qrnn"])
def test_fresh_weights_are_bounded_and_forget_gates_open(cell: Literal["lstm", "qrnn"]) -> None:
    """Each tensor fills its range; biases are zero but the forget gates', which are 1."""
    shape = RecurrentLM(500, 40, 60, 2, (200,), cell)
    weights = initial_weights(shape, torch.Generator().manual_seed(0))
    assert {n: tuple(w.shape) for n, w in weights.items()} == {
        name: size for name, (size, _) in shape.layout().items()
    }
    for name, (_, bound) in shape.layout().items():
        if bound:
            assert 0.9 * bound < float(weights[name].abs().max()) <= bound, name
    assert not weights["softmax.bias"].any()
    for layer, hidden in enumerate((60, 40)):
        gates = weights[f"{cell}.{layer}.bias"].view(-1, hidden).mean(1).tolist()
        assert gates == [0.0, 1.0, *[0.0] * (len(gates) - 2)]


def test_dropout_scales_what_it_keeps_and_is_locked_over_time() -> None:
    base = tiny_base((), layers=1)
    ids = torch.full((4000, 2), 3)
    state = initial_state(base.model, 4000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    plain = run_lstm(base.weights, base.model, ids, state).output
    dropped = run_lstm(base.weights, base.model, ids, state, Dropout(output=0.5), generator).output
    zero = dropped == 0
    assert torch.equal(zero[:, 0], zero[:, 1])
    assert float(zero.double().mean()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(dropped[~zero], 2 * plain[~zero], **EXACT)


def test_weight_drop_zeroes_recurrent_weights_only() -> None:
    base = tiny_base((), layers=1)
    ids, state = torch.full((1, 1), 3), initial_state(base.model, 1, dtype=torch.float64)
    drop = Dropout(weight=0.999999)
    first = run_lstm(base.weights, base.model, ids, state, drop)
    plain = run_lstm(base.weights, base.model, ids, state)
    torch.testing.assert_close(first.output, plain.output)  # h = 0: recurrent weights unseen
    busy = _lanes_state(base, 1)
    gone = {**base.weights, "lstm.0.recurrent": torch.zeros(16, 4, dtype=torch.float64)}
    torch.testing.assert_close(
        run_lstm(base.weights, base.model, ids, busy, drop).output,
        run_lstm(gone, base.model, ids, busy).output,
    )
