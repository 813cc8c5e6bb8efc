"""The LSTM recurrence in which every lane carries its own weights: the engine of the project.

Letters: B lanes, T time, H hidden. Gate order is PyTorch's: input, forget, cell, output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CACHE_BYTES = 8 << 20


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


class LaneRecurrence(torch.autograd.Function):
    """The time loop of one LSTM layer, without an autograd graph over time steps.

    Forward saves the activated gates of all steps; backward walks the steps once and forms the
    gradient of the recurrent weights with ONE batched product over all of them. Everything that
    does not depend on the previous step (input projection, its gradient, the derivative factors
    of the gates) is computed for all steps at once, outside the loop.
    """

    @staticmethod
    def forward(ctx: Any, gates_BTG: Tensor, recurrent: Tensor, h_BH: Tensor, c_BH: Tensor):
        """Arguments: input projection plus bias (B, T, 4H); U (4H, H) or (B, 4H, H); state.

        Returns outputs (B, T, H), last h (B, H), last c (B, H).
        """
        lanes, steps, _ = gates_BTG.shape
        hidden = h_BH.shape[1]
        gates_TBG = gates_BTG.transpose(0, 1).contiguous()
        if gates_TBG.data_ptr() == gates_BTG.data_ptr():  # one lane or one step: do not overwrite
            gates_TBG = gates_TBG.clone()
        h_TBH = gates_TBG.new_empty(steps + 1, lanes, hidden)
        c_TBH = torch.empty_like(h_TBH)
        tanh_c_TBH = gates_TBG.new_empty(steps, lanes, hidden)
        h_TBH[0], c_TBH[0] = h_BH, c_BH
        for block in _lane_blocks(recurrent, lanes):
            weights = recurrent if recurrent.dim() == 2 else recurrent[block]
            for t in range(steps):
                a = gates_TBG[t, block]
                a += _recur(h_TBH[t, block], weights)
                cell, o = a[:, 2 * hidden : 3 * hidden], a[:, 3 * hidden :]
                a[:, : 2 * hidden].sigmoid_()
                cell.tanh_()
                o.sigmoid_()
                c = torch.mul(a[:, hidden : 2 * hidden], c_TBH[t, block], out=c_TBH[t + 1, block])
                c.addcmul_(a[:, :hidden], cell)
                torch.mul(o, torch.tanh(c, out=tanh_c_TBH[t, block]), out=h_TBH[t + 1, block])
        ctx.save_for_backward(gates_TBG, recurrent, h_TBH, c_TBH, tanh_c_TBH)
        return h_TBH[1:].transpose(0, 1), h_TBH[-1].clone(), c_TBH[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        """Back-propagation through time; gradients in the order of `forward`'s arguments."""
        dy_BTH, dh_last, dc_last = grads
        gates_TBG, recurrent, h_TBH, c_TBH, tanh_c_TBH = ctx.saved_tensors
        steps, lanes, hidden = tanh_c_TBH.shape
        i, f, g, o = (gates_TBG[..., k * hidden : (k + 1) * hidden] for k in range(4))
        # d gates = factor * (dc for i, f, g; dh for o): the factors need no earlier step.
        factor = torch.empty_like(gates_TBG)
        torch.mul(i - i * i, g, out=factor[..., :hidden])
        torch.mul(f - f * f, c_TBH[:-1], out=factor[..., hidden : 2 * hidden])
        torch.mul(1 - g * g, i, out=factor[..., 2 * hidden : 3 * hidden])
        torch.mul(o - o * o, tanh_c_TBH, out=factor[..., 3 * hidden :])
        through_tanh = o * (1 - tanh_c_TBH * tanh_c_TBH)
        factor = factor.view(steps, lanes, 4, hidden)
        dgates = torch.empty_like(factor)
        dy_TBH = dy_BTH.transpose(0, 1)
        dh_all, dc_all = dh_last.clone(), dc_last.clone()
        for block in _lane_blocks(recurrent, lanes):
            weights = recurrent if recurrent.dim() == 2 else recurrent[block]
            dh, dc = dh_all[block], dc_all[block]
            for t in reversed(range(steps)):
                dh = dh + dy_TBH[t, block]
                dc.addcmul_(dh, through_tanh[t, block])
                now, scale = dgates[t, block], factor[t, block]
                torch.mul(scale[:, :3], dc.unsqueeze(1), out=now[:, :3])
                torch.mul(scale[:, 3], dh, out=now[:, 3])
                dc *= f[t, block]
                dh = _recur_back(now.view(-1, 4 * hidden), weights)
            dh_all[block] = dh
        dgates_TBG = dgates.view(steps, lanes, -1)
        drecurrent = None
        if ctx.needs_input_grad[1]:
            if recurrent.dim() == 2:
                drecurrent = dgates_TBG.flatten(0, 1).t() @ h_TBH[:-1].flatten(0, 1)
            else:
                drecurrent = torch.bmm(dgates_TBG.permute(1, 2, 0), h_TBH[:-1].transpose(0, 1))
        return dgates_TBG.transpose(0, 1), drecurrent, dh_all, dc_all


def lane_lstm(
    x_BTI: Tensor, weights: tuple[Tensor, Tensor, Tensor], h_BH: Tensor, c_BH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer whose weights may differ from lane to lane.

    Args:
        x_BTI: inputs (B, T, I).
        weights: input (4H, I), recurrent (4H, H), bias (4H), each shared or with a leading B.
        h_BH, c_BH: the state before the first step.

    Returns:
        outputs (B, T, H), last h and c (B, H). Differentiable once in every argument.
    """
    w_input, w_recurrent, bias = weights
    gates = x_BTI @ w_input.transpose(-1, -2)
    gates = gates + (bias if bias.dim() == 1 else bias.unsqueeze(1))
    y, h, c = LaneRecurrence.apply(gates, w_recurrent, h_BH, c_BH)  # type: ignore[misc]
    return y, h, c
