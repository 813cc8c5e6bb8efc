"""The QRNN in which every lane carries its own weights (Bradbury et al. 2017, arXiv 1611.01576).

Letters: B lanes, T time, I inputs, H hidden, G = 3H gates in the order z, f, o.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm import kernels
from mlm.models.recurrence import is_plain, lane_linear


class LanePooling(torch.autograd.Function):
    """The time loop of one QRNN layer (fo-pooling, Bradbury et al. 2017, eq. 4).

        c_t = f_t c_{t-1} + (1 - f_t) z_t,   h_t = o_t c_t

    z = tanh, f and o = sigmoid of the convolution. No weights are in the loop: forward saves the
    activated gates and cells, backward walks the steps once. On a CPU in a compiled kernel
    (`mlm.kernels.compile`), elsewhere `qrnn_eager_forward` and `qrnn_eager_backward` take all lanes
    step by step.
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
        _run(kernels.qrnn_forward, qrnn_eager_forward, gates_BTG, c_BTH, y_BTH)
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
        _run(kernels.qrnn_backward, qrnn_eager_backward, *own)
        return dgates_BTG, dc_BH


def _run(kernel: Any, eager: Any, gates_BTG: Tensor, *lane_tensors: Tensor) -> None:
    """The time loop of every lane: compiled where that is possible, else eager."""
    if kernels.usable(gates_BTG, *lane_tensors):
        kernels.share_out(kernel, len(gates_BTG), gates_BTG.numel(), gates_BTG, *lane_tensors)
    else:
        eager(gates_BTG, *lane_tensors)


def qrnn_eager_forward(gates_BTG: Tensor, c_BTH: Tensor, y_BTH: Tensor) -> None:
    """`kernels.qrnn_forward` for all lanes with tensor operations; arguments as there."""
    hidden = y_BTH.shape[2]
    z, f, o = gates_BTG.split(hidden, 2)
    z.tanh_()
    gates_BTG[..., hidden:].sigmoid_()
    for t in range(gates_BTG.shape[1]):
        torch.lerp(z[:, t], c_BTH[:, t], f[:, t], out=c_BTH[:, t + 1])
    torch.mul(o, c_BTH[:, 1:], out=y_BTH)


def qrnn_eager_backward(
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
