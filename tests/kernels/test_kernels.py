"""The compiled kernels against their eager twins and plain formulas."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from worlds import segments, tiny_base

from mlm import kernels
from mlm.kernels import buffers
from mlm.models import output_layer
from mlm.models.output_layer import Layer, fused_nll, supports
from mlm.models.recurrence import LaneRecurrence
from mlm.reading.step import begin, read
from mlm.rules.hand_made import SGD, relax_weights
from mlm.rules.protocol import Static

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="numba is not installed")
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12}
"""float64, sums of at most a hundred terms of size one in another order."""
SINGLE: dict[str, Any] = {"rtol": 0.0, "atol": 3e-6}
"""float32: 2e-7 for each exp, through at most a dozen steps."""


def _random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def _recurrence(hidden: int, dtype: torch.dtype, shared: bool, lanes: int = 3) -> list[Tensor]:
    """Outputs, last state and all gradients of the time loop."""
    lead = () if shared else (lanes,)
    inputs = [
        _random(lanes, 9, 4 * hidden, seed=1, dtype=dtype),
        _random(*lead, 4 * hidden, hidden, seed=2, dtype=dtype) * 0.5,
        _random(lanes, hidden, seed=3, dtype=dtype),
        _random(lanes, hidden, seed=4, dtype=dtype),
    ]
    leaves = [x.requires_grad_() for x in inputs]
    outputs = LaneRecurrence.apply(*leaves)
    weighted = [(o * _random(*o.shape, seed=9, dtype=dtype)).sum() for o in outputs]
    return [*outputs, *torch.autograd.grad(torch.stack(weighted).sum(), leaves)]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hidden", [1, 5, 8])
def test_time_loop_equals_its_eager_twin(hidden: int, shared: bool, dtype, close) -> None:
    """Hidden sizes whose 4 H rows are, and are not, a multiple of the eight taken at a time."""
    found = _recurrence(hidden, dtype, shared)
    with kernels.eager():
        expected = _recurrence(hidden, dtype, shared)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("head_own", [False, True])
@pytest.mark.parametrize("bias_own", [False, True])
@pytest.mark.parametrize("low_own", [None, False, True])
@pytest.mark.parametrize("group", [1, 2, 9])
def test_softmax_equals_cross_entropy(head_own, bias_own, low_own, group, monkeypatch) -> None:
    """Losses, their weighted sum and every gradient; one lane at a time, two, all."""
    lanes, steps, width, size, rank = 3, 5, 4, 11, 2
    monkeypatch.setattr(output_layer, "LOGITS", group * steps * size)

    def tensor(own: bool, *shape: int, seed: int) -> Tensor:
        return _random(*((lanes,) if own else ()), *shape, seed=seed).requires_grad_(own)

    output = _random(lanes, steps, width, seed=1).requires_grad_()
    head = tensor(head_own, size, width, seed=2)
    bias = tensor(bias_own, size, seed=3)
    low = None if low_own is None else tensor(low_own, size, rank, seed=4)
    along = None if low_own is None else _random(lanes, steps, rank, seed=5).requires_grad_()
    targets = torch.randint(0, size, (lanes, steps), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(lanes, steps, dtype=torch.float64)
    weights[1, 2:] = 0
    layer = Layer(head, bias, low)
    assert supports(output, layer)
    nll, total = fused_nll(output, layer, along, targets, weights)
    logits = output @ head.transpose(-1, -2) + (bias.unsqueeze(1) if bias_own else bias)
    if low is not None and along is not None:
        logits = logits + along @ low.transpose(-1, -2)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nll, expected.view_as(nll).detach(), **EXACT)
    leaves = [x for x in (output, head, bias, low, along) if x is not None and x.requires_grad]
    wanted = torch.autograd.grad((expected.view_as(nll) * weights).sum() * 3, leaves)
    for got, want in zip(torch.autograd.grad(total * 3, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_softmax_without_gradients_leaves_leaves_alone() -> None:
    """Shared weights in training are scored with no gradient taken, and none is computed."""
    layer = Layer(_random(7, 4).requires_grad_(), _random(7, seed=1).requires_grad_())
    output, targets = _random(2, 3, 4, seed=2), torch.zeros(2, 3, dtype=torch.int64)
    assert not supports(output, layer)
    with torch.no_grad():
        assert supports(output, layer)
        nll, total = fused_nll(output, layer, None, targets, torch.ones(2, 3))
    assert not total.requires_grad
    expected = F.cross_entropy(
        (output @ layer.head.t() + layer.bias).flatten(0, 1), targets.view(-1)
    )
    torch.testing.assert_close(nll.mean(), expected, **EXACT)


def test_softmax_of_large_logits_is_finite_and_of_nan_is_nan() -> None:
    output = torch.tensor([[[300.0]], [[float("nan")]], [[-300.0]]])
    layer = Layer(torch.tensor([[3.0], [-3.0]]), torch.zeros(2))
    targets = torch.tensor([[0], [0], [0]])
    nll, _ = fused_nll(output, layer, None, targets, torch.ones(3, 1))
    assert nll[0, 0] == 0
    assert nll[1, 0].isnan()
    assert float(nll[2, 0]) == pytest.approx(1800)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("lanes", [1, 3])
def test_relax_equals_its_eager_twin(lanes: int, flush: bool) -> None:
    """Over tensors smaller and larger than a tile."""
    for number in (7, 2 * kernels.TILE + 5):
        theta, gradient = (_random(lanes, number, seed=k) for k in (1, 2))
        start, step, z = (_random(number, seed=k).abs() for k in (3, 4, 5))
        a, b = _random(lanes, seed=6), _random(lanes, seed=7).abs() / 9
        rest = (start, step, z / 9 if flush else None, a, b)
        found = relax_weights(theta, gradient, *rest, torch.empty_like(theta))
        with kernels.eager():
            expected = relax_weights(theta, gradient, *rest, torch.empty_like(theta))
        torch.testing.assert_close(found, expected, **EXACT)


def test_exp_is_exact_to_single_precision() -> None:
    """Softmax of one big and one small logit gives exp of their distance."""
    x = torch.linspace(0, 85, 4001)
    output = x.view(-1, 1, 1)
    layer = Layer(torch.tensor([[0.0], [-1.0]]), torch.zeros(2))
    targets = torch.zeros(len(x), 1, dtype=torch.int64)
    leaf = output.clone().requires_grad_()
    _, total = fused_nll(leaf, layer, None, targets, torch.ones(len(x), 1))
    (gradient,) = torch.autograd.grad(total, leaf)
    expected = -torch.exp(-x.double()) / (1 + torch.exp(-x.double()))
    torch.testing.assert_close(gradient.flatten().double(), expected, rtol=5e-7, atol=0)


def test_work_is_shared_between_threads_and_every_part_is_done(monkeypatch) -> None:
    """Each lane exactly once, on as many threads as PyTorch may use."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    done, lock, threads = [], threading.Lock(), set()

    def kernel(lo: int, hi: int) -> None:
        with lock:
            done.extend(range(lo, hi))
            threads.add(threading.get_ident())

    kernels.share_out(kernel, 8, 1 << 30)
    assert sorted(done) == list(range(8))
    assert len(threads) > 1
    done.clear()
    threads.clear()
    kernels.share_out(kernel, 8, 10)
    assert (sorted(done), threads) == (list(range(8)), {threading.get_ident()})


def test_an_error_in_another_thread_is_raised(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def kernel(lo: int, hi: int) -> None:
        if lo:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        kernels.share_out(kernel, 4, 1 << 30)


def test_a_tensor_with_holes_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        kernels.share_out(lambda lo, hi, x: None, 1, 1, torch.zeros(4, 4)[:, :2])


def test_eager_switches_the_kernels_off_and_on_again() -> None:
    x = torch.zeros(2)
    assert kernels.usable(x)
    with kernels.eager():
        assert not kernels.usable(x)
    assert kernels.usable(x)
    assert not kernels.usable(x.bfloat16())


def test_a_tensor_released_is_acquired_again() -> None:
    """Only large ones, only in the same shape; another number of lanes frees the others."""
    buffers.clear()
    like, small = torch.zeros(4, 300_000), torch.zeros(4, 3)
    where = like.data_ptr()
    buffers.release([like, small])
    assert buffers.acquire((4, 300_000), small.double()).data_ptr() != where
    assert buffers.acquire((4, 3), small).data_ptr() != small.data_ptr()
    assert buffers.acquire((4, 300_000), small).data_ptr() == where
    assert buffers.acquire((4, 300_000), small).data_ptr() != where
    buffers.release([like])
    buffers.acquire((3, 300_000), small)
    assert buffers.acquire((4, 300_000), small).data_ptr() != where
    buffers.release([like])
    buffers.clear()
    assert not buffers._pool.free


@pytest.mark.parametrize("learns", [True, False])
def test_reading_reuses_memory_and_nobody_sees_it(learns: bool) -> None:
    """Segments read one after the other, articles beginning between them, equal the same read with
    nothing given; what is given is overwritten here, and no reader notices."""
    base = tiny_base(("lstm.0.recurrent", "lstm.0.input"))
    pieces = segments(base, (12, 7, 23, 9), 2, 8)
    assert sum(int(piece.new.sum()) for piece in pieces) > 4
    rule = (
        SGD().bind({"rate": torch.tensor(0.1, dtype=torch.float64)}, base)
        if learns
        else Static().bind({}, base)
    )
    release = buffers.release

    def spoil(tensors: Iterable[Tensor]) -> None:
        found = list(tensors)
        for tensor in found:
            tensor.detach().fill_(torch.nan)
        release(found)

    def weights(smallest: int, monkey: pytest.MonkeyPatch) -> list[Tensor]:
        monkey.setattr(buffers, "MIN_BYTES", smallest)
        buffers.clear()
        readers = [begin(base, 2)]
        for piece in pieces:
            readers.append(read(base, rule, readers[-1], piece)[0])
        return [w for reader in readers for w in reader.weights.values()]

    with pytest.MonkeyPatch.context() as monkey:
        plain = weights(1 << 40, monkey)
        monkey.setattr(buffers, "release", spoil)
        reused = weights(0, monkey)
        for name in base.dynamic:  # gradients, and weights of before a lane was reset
            w = base.weights[name]
            assert len(buffers._pool.free[tuple(w.shape), w.dtype]) == 1 + learns
    buffers.clear()
    for a, b in zip(plain, reused, strict=True):
        assert torch.equal(a, b)
