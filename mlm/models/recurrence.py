"""Recurrences in which every lane carries its own weights: the engine of the project.

An LSTM's time loop, and a QRNN's (Bradbury et al. 2017, arXiv 1611.01576).
Letters: B lanes, T time, I inputs, H hidden. Gate order of an LSTM is PyTorch's: input, forget,
cell, output; of a QRNN z, f, o.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlm import kernels
from mlm.kernels.bfloat16 import lowered, product, release_lowered
from mlm.kernels.buffers import acquire

CACHE_BYTES = 8 << 20
"""Of all cores together."""
_OWN_CACHE_BYTES = 2 << 20

_plain = False


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Within it the language model is made of plain operations, which autograd can differentiate
    any number of times (second order); slow."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Whether plain operations are asked for."""
    return _plain


def _recur(h_BH: Tensor, recurrent: Tensor) -> Tensor:
    """h @ U^T for shared `recurrent` (4H, H) or per-lane (B, 4H, H) weights -> (B, 4H)."""
    if recurrent.dim() == 2:
        return h_BH @ recurrent.t()
    # h as a row vector: U is then read along its rows, 6x faster on a CPU than U @ h[:, :, None].
    return torch.bmm(h_BH.unsqueeze(1), recurrent.transpose(1, 2)).squeeze(1)


def _recur_back(dgates_BG: Tensor, recurrent: Tensor) -> Tensor:
    """The transpose of `_recur`: (B, 4H) -> (B, H)."""
    if recurrent.dim() == 2:
        return dgates_BG @ recurrent
    return torch.bmm(dgates_BG.unsqueeze(1), recurrent).squeeze(1)


def _lane_blocks(recurrent: Tensor, lanes: int) -> list[slice]:
    """Lanes to run together: on a CPU as many as keep their recurrent weights in the cache.

    Sixteen lanes of 1 MB each stream from memory at every step; two blocks of eight stay in an
    8 MB cache over the whole segment and run 3x faster (float32, H = 256, one thread).
    """
    if recurrent.dim() == 2 or recurrent.device.type != "cpu":
        return [slice(0, lanes)]
    size = max(1, CACHE_BYTES // (recurrent[0].numel() * recurrent.element_size()))
    return [slice(lo, min(lo + size, lanes)) for lo in range(0, lanes, size)]


def leaves_cache(recurrent: Tensor) -> bool:
    """Whether a core's cache loses a lane's recurrent weights (4H, H) between two steps.

    What is read again at every step then sets the time, and bfloat16, where products are made so,
    is half of it (H = 640: 1.7x faster; H = 256: no faster).
    """
    return 4 * recurrent.numel() > _OWN_CACHE_BYTES


class LaneRecurrence(torch.autograd.Function):
    """The time loop of one LSTM layer, without an autograd graph over time steps.

    Forward saves the activated gates of all steps; backward walks the steps once and forms the
    gradient of the recurrent weights with ONE batched product over all of them. On a CPU each
    lane runs through all its steps in a compiled kernel (`mlm.kernels`), its weights in the
    cache; elsewhere `lstm_eager_forward` and `lstm_eager_backward` take all lanes step by step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gates_BTG: Tensor,
        recurrent: Tensor,
        h_BH: Tensor,
        c_BH: Tensor,
        low: Tensor | None = None,
        directions: Tensor | None = None,
    ):
        """Arguments: input projection plus bias (B, T, 4H); U (4H, H) or (B, 4H, H); state; and,
        to be added to U, the product of D (B, 4H, R) and P (R, H).

        Returns outputs (B, T, H), last h (B, H), last c (B, H).
        """
        lanes, steps, hidden = *gates_BTG.shape[:2], h_BH.shape[1]
        h_BTH = gates_BTG.new_empty(lanes, steps + 1, hidden)
        c_BTH, tanh_c_BTH = torch.empty_like(h_BTH), gates_BTG.new_empty(lanes, steps, hidden)
        h_BTH[:, 0], c_BTH[:, 0] = h_BH, c_BH
        gates_BTG = gates_BTG.clone(memory_format=torch.contiguous_format)
        if low is None or directions is None:
            low, directions = gates_BTG.new_empty(lanes, 0, 0), gates_BTG.new_empty(0, hidden)
        own = (gates_BTG, h_BTH, c_BTH, tanh_c_BTH)
        _run(kernels.lstm_forward, lstm_eager_forward, recurrent, (low, directions), *own)
        ctx.save_for_backward(recurrent, low, directions, *own)
        return h_BTH[:, 1:], h_BTH[:, -1].clone(), c_BTH[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        """Back-propagation through time; gradients in the order of `forward`'s arguments."""
        dy_BTH, dh_last, dc_last = grads
        recurrent, low, directions, gates_BTG, h_BTH, c_BTH, tanh_c_BTH = ctx.saved_tensors
        dh, dc = (g.clone(memory_format=torch.contiguous_format) for g in (dh_last, dc_last))
        dgates_BTG = torch.empty_like(gates_BTG)
        own = (gates_BTG, c_BTH, tanh_c_BTH, dy_BTH.contiguous(), dh, dc, dgates_BTG)
        _run(kernels.lstm_backward, lstm_eager_backward, recurrent, (low, directions), *own)
        before = h_BTH[:, :-1]
        drecurrent = dlow = None
        if ctx.needs_input_grad[1]:
            if recurrent.dim() == 2:
                drecurrent = dgates_BTG.flatten(0, 1).t() @ before.flatten(0, 1)
            else:
                drecurrent = acquire(tuple(recurrent.shape), recurrent)
                product(dgates_BTG.transpose(1, 2), before, drecurrent)
        if any(ctx.needs_input_grad[4:5]):
            dlow = acquire(tuple(low.shape), low)
            torch.bmm(dgates_BTG.transpose(1, 2), before @ directions.t(), out=dlow)
        return dgates_BTG, drecurrent, dh, dc, dlow, None


def _run(
    kernel: Any,
    eager: Any,
    recurrent: Tensor,
    change: tuple[Tensor, Tensor],
    *lane_tensors: Tensor,
) -> None:
    """The time loop of every lane: compiled where that is possible, else eager, block by block."""
    (low, directions), lanes = change, len(lane_tensors[0])
    read = lowered(recurrent) if recurrent.dim() == 3 and leaves_cache(recurrent[0]) else recurrent
    if kernels.usable(recurrent, *change, *lane_tensors):
        weights = read if read.dim() == 3 else read.unsqueeze(0)
        work = lanes * lane_tensors[0].shape[1] * weights[0].numel()
        fixed = (t.contiguous() for t in (weights, low, directions))
        kernels.share_out(kernel, lanes, work, *fixed, *lane_tensors)
    else:
        for block in _lane_blocks(recurrent, lanes):
            weights = read if read.dim() == 2 else read[block].to(recurrent.dtype)
            own = (tensor[block] for tensor in lane_tensors)
            eager(weights, low[block], directions, *own)
    release_lowered(read, recurrent)


def lstm_eager_forward(
    recurrent: Tensor,
    low: Tensor,
    directions: Tensor,
    gates_BTG: Tensor,
    h_BTH: Tensor,
    c_BTH: Tensor,
    tanh_c_BTH: Tensor,
) -> None:
    """`kernels.lstm_forward` for all lanes with tensor operations; arguments as there."""
    hidden = h_BTH.shape[2]
    for t in range(gates_BTG.shape[1]):
        a = gates_BTG[:, t]
        a += _recur(h_BTH[:, t], recurrent)
        if len(directions):
            a += _recur(_recur(h_BTH[:, t], directions), low)
        i, f, g, o = a.split(hidden, 1)
        a[:, : 2 * hidden].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c_BTH[:, t + 1] = torch.addcmul(f * c_BTH[:, t], i, g)
        torch.tanh(c_BTH[:, t + 1], out=tanh_c_BTH[:, t])
        torch.mul(o, tanh_c_BTH[:, t], out=h_BTH[:, t + 1])


def lstm_eager_backward(
    recurrent: Tensor,
    low: Tensor,
    directions: Tensor,
    gates_BTG: Tensor,
    c_BTH: Tensor,
    tanh_c_BTH: Tensor,
    dy_BTH: Tensor,
    dh_BH: Tensor,
    dc_BH: Tensor,
    dgates_BTG: Tensor,
) -> None:
    """`kernels.lstm_backward` for all lanes with tensor operations; arguments as there.

    What does not depend on the next step (the factors of the gates) is computed for all steps at
    once, outside the loop.
    """
    lanes, steps, hidden = tanh_c_BTH.shape
    i, f, g, o = gates_BTG.split(hidden, 2)
    # d gates = factor * (dc for i, f, g; dh for o): the factors need no later step.
    factor = torch.empty_like(gates_BTG)
    torch.mul(i - i * i, g, out=factor[..., :hidden])
    torch.mul(f - f * f, c_BTH[:, :-1], out=factor[..., hidden : 2 * hidden])
    torch.mul(1 - g * g, i, out=factor[..., 2 * hidden : 3 * hidden])
    torch.mul(o - o * o, tanh_c_BTH, out=factor[..., 3 * hidden :])
    through_tanh = o * (1 - tanh_c_BTH * tanh_c_BTH)
    factor = factor.view(lanes, steps, 4, hidden)
    dgates = dgates_BTG.view(lanes, steps, 4, hidden)
    for t in reversed(range(steps)):
        dh_BH += dy_BTH[:, t]
        dc_BH.addcmul_(dh_BH, through_tanh[:, t])
        torch.mul(factor[:, t, :3], dc_BH.unsqueeze(1), out=dgates[:, t, :3])
        torch.mul(factor[:, t, 3], dh_BH, out=dgates[:, t, 3])
        dc_BH *= f[:, t]
        dh_BH.copy_(_recur_back(dgates_BTG[:, t], recurrent))
        if len(directions):
            dh_BH += _recur_back(_recur_back(dgates_BTG[:, t], low), directions)


class LaneLinear(torch.autograd.Function):
    """x W^T + bias of every lane (B, T, O) for a per-lane W (B, O, I).

    Autograd's own gradient of W is a transposed view, which every later pass over the weights
    would read across its rows; here it is laid out as W is.
    """

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Arguments: x (B, T, I), W (B, O, I), bias (O) or (B, O)."""
        ctx.save_for_backward(x_BTI, weight)
        ctx.bias_dim = bias.dim()
        bias = bias.unsqueeze(-2) if bias.dim() == 2 else bias
        return torch.baddbmm(bias, x_BTI, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        """Gradients in the order of `forward`'s arguments."""
        (dy_BTO,) = grads
        x_BTI, weight = ctx.saved_tensors
        dx = torch.bmm(dy_BTO, weight) if ctx.needs_input_grad[0] else None
        dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = acquire(tuple(weight.shape), weight)
            product(dy_BTO.transpose(1, 2), x_BTI, dweight)
        if ctx.needs_input_grad[2]:
            dbias = dy_BTO.sum(1 if ctx.bias_dim == 2 else (0, 1))
        return dx, dweight, dbias


def lane_linear(x_BTI: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + bias (B, T, O); W (O, I) and bias (O) are shared or have a leading B."""
    if weight.dim() == 3 and not _plain:
        return LaneLinear.apply(x_BTI, weight, bias)  # type: ignore[return-value]
    return x_BTI @ weight.mT + (bias if bias.dim() == 1 else bias.unsqueeze(1))


def plain_lstm(
    gates_BTG: Tensor, recurrent: Tensor, h_BH: Tensor, c_BH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`LaneRecurrence` step by step in plain operations; arguments and results as there."""
    steps = []
    for a_BG in gates_BTG.unbind(1):
        i, f, g, o = (a_BG + _recur(h_BH, recurrent)).chunk(4, 1)
        c_BH = f.sigmoid() * c_BH + i.sigmoid() * g.tanh()
        h_BH = o.sigmoid() * c_BH.tanh()
        steps.append(h_BH)
    return torch.stack(steps, 1), h_BH, c_BH


def lane_lstm(
    x_BTI: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    h_BH: Tensor,
    c_BH: Tensor,
    extra_BTG: Tensor | None = None,
    change: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer whose weights may differ from lane to lane.

    Args:
        x_BTI: inputs (B, T, I).
        weights: input (4H, I), recurrent (4H, H), bias (4H), each shared or with a leading B.
        h_BH, c_BH: the state before the first step.
        extra_BTG: (B, T, 4H), added to the input projection.
        change: D (B, 4H, R) and P (R, H), whose product is added to the recurrent weights; P has no
            gradient but within `plain_operations`.

    Returns:
        outputs (B, T, H), last h and c (B, H). Differentiable once in every argument, any number
        of times within `plain_operations`.
    """
    w_input, w_recurrent, bias = weights
    gates = lane_linear(x_BTI, w_input, bias)
    gates = gates if extra_BTG is None else gates + extra_BTG
    if _plain:
        whole = w_recurrent if change is None else w_recurrent + change[0] @ change[1]
        return plain_lstm(gates, whole, h_BH, c_BH)
    own = (gates, w_recurrent, h_BH, c_BH, *(change or ()))
    y, h, c = LaneRecurrence.apply(*own)  # type: ignore[misc]
    return y, h, c


# -- QRNN


class LanePooling(torch.autograd.Function):
    """The time loop of one QRNN layer (fo-pooling, Bradbury et al. 2017, eq. 4).

        c_t = f_t c_{t-1} + (1 - f_t) z_t,   h_t = o_t c_t

    z = tanh, f and o = sigmoid of the convolution. No weights are in the loop: forward saves the
    activated gates and cells, backward walks the steps once. On a CPU in a compiled kernel
    (`mlm.kernels`), elsewhere `eager_pool_forward` and `eager_pool_backward` take all lanes step by
    step.
    """

    @staticmethod
    def forward(ctx: Any, gates_BTG: Tensor, c_BH: Tensor):
        """Arguments: the convolution's output (B, T, 3H); the cells before the first step.

        Returns outputs (B, T, H), last c (B, H).
        """
        lanes, steps, hidden = *gates_BTG.shape[:2], c_BH.shape[1]
        c_BTH = gates_BTG.new_empty(lanes, steps + 1, hidden)
        c_BTH[:, 0] = c_BH
        y_BTH = gates_BTG.new_empty(lanes, steps, hidden)
        gates_BTG = gates_BTG.clone(memory_format=torch.contiguous_format)
        _pool(kernels.qrnn_forward, eager_pool_forward, gates_BTG, c_BTH, y_BTH)
        ctx.save_for_backward(gates_BTG, c_BTH)
        return y_BTH, c_BTH[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        """Back-propagation through time; gradients in the order of `forward`'s arguments."""
        dy_BTH, dc_last = grads
        gates_BTG, c_BTH = ctx.saved_tensors
        dc_BH = dc_last.clone(memory_format=torch.contiguous_format)
        dgates_BTG = torch.empty_like(gates_BTG)
        own = (gates_BTG, c_BTH, dy_BTH.contiguous(), dc_BH, dgates_BTG)
        _pool(kernels.qrnn_backward, eager_pool_backward, *own)
        return dgates_BTG, dc_BH


def _pool(kernel: Any, eager: Any, gates_BTG: Tensor, *lane_tensors: Tensor) -> None:
    """The time loop of every lane: compiled where that is possible, else eager."""
    if kernels.usable(gates_BTG, *lane_tensors):
        kernels.share_out(kernel, len(gates_BTG), gates_BTG.numel(), gates_BTG, *lane_tensors)
    else:
        eager(gates_BTG, *lane_tensors)


def eager_pool_forward(gates_BTG: Tensor, c_BTH: Tensor, y_BTH: Tensor) -> None:
    """`kernels.qrnn_forward` for all lanes with tensor operations; arguments as there."""
    hidden = y_BTH.shape[2]
    z, f, o = gates_BTG.split(hidden, 2)
    z.tanh_()
    gates_BTG[..., hidden:].sigmoid_()
    for t in range(gates_BTG.shape[1]):
        torch.lerp(z[:, t], c_BTH[:, t], f[:, t], out=c_BTH[:, t + 1])
    torch.mul(o, c_BTH[:, 1:], out=y_BTH)


def eager_pool_backward(
    gates_BTG: Tensor, c_BTH: Tensor, dy_BTH: Tensor, dc_BH: Tensor, dgates_BTG: Tensor
) -> None:
    """`kernels.qrnn_backward` for all lanes with tensor operations; arguments as there."""
    hidden = dy_BTH.shape[2]
    z, f, o = gates_BTG.split(hidden, 2)
    dz, df, do = dgates_BTG.split(hidden, 2)
    torch.mul(dy_BTH * c_BTH[:, 1:], o - o * o, out=do)
    torch.mul(1 - f, 1 - z * z, out=dz)  # times dc below
    torch.mul(c_BTH[:, :-1] - z, f - f * f, out=df)
    for t in reversed(range(gates_BTG.shape[1])):
        dc_BH.addcmul_(dy_BTH[:, t], o[:, t])
        dz[:, t] *= dc_BH
        df[:, t] *= dc_BH
        dc_BH *= f[:, t]


def plain_pooling(gates_BTG: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """`LanePooling` step by step in plain operations; arguments and results as there."""
    z, f, o = gates_BTG.chunk(3, 2)
    z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
    steps = []
    for t in range(gates_BTG.shape[1]):
        c_BH = f[:, t] * c_BH + (1 - f[:, t]) * z[:, t]
        steps.append(o[:, t] * c_BH)
    return torch.stack(steps, 1), c_BH


def lane_qrnn(
    x_BTI: Tensor, weights: tuple[Tensor, Tensor], c_BH: Tensor, before_BI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One QRNN layer whose weights may differ from lane to lane.

    Args:
        x_BTI: inputs (B, T, I).
        weights: input (3H, window * I), bias (3H), each shared or with a leading B.
        c_BH: the cells before the first step.
        before_BI: the input before the first; the window then is two tokens, the earlier one's
            columns first. None = the window is one token.

    Returns:
        outputs (B, T, H), last c (B, H). Differentiable once in every argument, any number of
        times within `plain_operations`.
    """
    if before_BI is not None:
        earlier = torch.cat([before_BI.unsqueeze(1), x_BTI[:, :-1]], 1)
        x_BTI = torch.cat([earlier, x_BTI], 2)
    gates = lane_linear(x_BTI, *weights).to(c_BH.dtype)  # a half precision ends at the loop
    if is_plain():
        return plain_pooling(gates, c_BH)
    y, c = LanePooling.apply(gates, c_BH)  # type: ignore[misc]
    return y, c
