"""One step of training in bfloat16 on the CPU: LSTM layers and softmax with shared weights.

The library's LSTM in bfloat16 spends most of its time beside the products. Here products are the
library's; what lies between them is one compiled pass over the data, which stays in bfloat16 (as
its 16 bits) wherever it is only read again. Sums, cells, losses and gradients of weights are
float32, and so are the weights.
Letters: B lanes, T time, I inputs, H hidden, G = 4H gates, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm import kernels
from mlm.models.language_model import Weights
from mlm.models.recurrent import RecurrentLM, RecurrentState
from mlm.text.streams import Segment


class _Layer(torch.autograd.Function):
    """An LSTM layer: inputs (T, B, I) in bfloat16, outputs (T, B, H), last h and c (B, H)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_input: Tensor, recurrent: Tensor, bias: Tensor, h: Tensor, c: Tensor
    ):
        steps, lanes, inputs = x.shape
        hidden = h.shape[1]
        w_input, recurrent = w_input.bfloat16(), recurrent.bfloat16()
        projected = (x.reshape(-1, inputs) @ w_input.t()).view(steps, lanes, -1)
        gates, again = torch.empty_like(projected), torch.empty_like(projected[0])
        h_TBH = projected.new_empty(steps + 1, lanes, hidden)
        tanh_c = torch.empty_like(h_TBH[1:])
        c_TBH = c.new_empty(steps + 1, lanes, hidden)
        h_TBH[0], c_TBH[0] = h, c
        every = [kernels.as_array(part) for part in (gates, c_TBH, c_TBH[1:], tanh_c, h_TBH[1:])]
        from_input, from_h, from_bias = map(kernels.as_array, (projected, again, bias))
        for t in range(steps):
            torch.mm(h_TBH[t], recurrent.t(), out=again)
            own = (from_input[t], from_h, from_bias, *(part[t] for part in every))
            kernels.share_out(kernels.half_lstm_forward, lanes, again.numel() * 8, *own)
        ctx.save_for_backward(x, w_input, recurrent, gates, h_TBH, c_TBH, tanh_c)
        return h_TBH[1:], h_TBH[-1].to(h.dtype), c_TBH[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        """Back-propagation through time; the state before the segment gets no gradient."""
        x, w_input, recurrent, gates, h_TBH, c_TBH, tanh_c = ctx.saved_tensors
        steps, lanes, width = gates.shape
        dgates, dy = torch.empty_like(gates), grads[0].contiguous()
        dc, dh = torch.zeros_like(c_TBH[0]), torch.zeros_like(h_TBH[0])
        every = [kernels.as_array(part) for part in (gates, c_TBH, tanh_c, dy)]
        from_h, from_c, found = kernels.as_array(dh), kernels.as_array(dc), kernels.as_array(dgates)
        for t in range(steps - 1, -1, -1):
            own = (*(part[t] for part in every), from_h, from_c, found[t])
            kernels.share_out(kernels.half_lstm_backward, lanes, dgates[t].numel() * 4, *own)
            if t:
                torch.mm(dgates[t], recurrent, out=dh)
        flat = dgates.view(-1, width)
        return (
            (flat @ w_input).view_as(x) if ctx.needs_input_grad[0] else None,
            (flat.t() @ x.reshape(-1, x.shape[-1])).float(),
            (flat.t() @ h_TBH[:-1].reshape(-1, h_TBH.shape[-1])).float(),
            flat.sum(0, dtype=torch.float32),
            None,
            None,
        )


class _Softmax(torch.autograd.Function):
    """The weighted sum of token losses of outputs (T, B, E) in bfloat16; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, table: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        steps, lanes, width = output.shape
        flat, low = output.reshape(-1, width), table.bfloat16()
        logits = flat @ low.t()  # then their gradient
        nll, dbias = bias.new_empty(steps, lanes), bias.new_zeros(steps, len(bias))
        own = (kernels.as_array(logits.view(steps, lanes, -1)), targets, weights, bias, nll, dbias)
        kernels.share_out(kernels.half_softmax_rows, steps, 8 * logits.numel(), *own)
        doutput = (logits @ low).view_as(output)
        ctx.save_for_backward(doutput, (logits.t() @ flat).float(), dbias.sum(0))
        return (nll * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        scale = grads[0]
        doutput, dtable, dbias = (
            saved if scale == 1 else saved * scale.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return doutput, dtable, dbias, None, None


def serves(shape: object, device: torch.device, *added: Tensor) -> bool:
    """Whether `half_precision_loss` can stand for the model's own: LSTM, one softmax, kernels."""
    plain = isinstance(shape, RecurrentLM) and shape.cell == "lstm" and not shape.cutoffs
    return plain and device.type == "cpu" and kernels.usable(*added)


def half_precision_loss(
    weights: Weights,
    shape: RecurrentLM,
    segment: Segment,
    state: RecurrentState,
    added: Sequence[Tensor] = (),
    count: Tensor | None = None,
) -> tuple[Tensor, RecurrentState]:
    """Mean loss of a segment's tokens in nats, and the state behind it, without its graph.

    Differentiable once in the float32 `weights` and in `added` (B, T, E), what is added to what
    the softmax sees. `count` is the number of tokens whose mean it is a part of; None = its own.
    """
    x = F.embedding(segment.inputs.t(), weights["embedding"]).bfloat16()
    h, c = [], []
    for layer in range(shape.layers):
        names = (f"lstm.{layer}.{part}" for part in ("input", "recurrent", "bias"))
        own = (weights[name] for name in names)
        x, h_end, c_end = _Layer.apply(x, *own, state.h[layer], state.c[layer])
        h.append(h_end)
        c.append(c_end)
    for part in added:
        x = x + part.transpose(0, 1).bfloat16()
    mask = segment.mask.t().float()
    share = (mask / (mask.sum() if count is None else count)).contiguous()
    own = (weights["embedding"], weights["softmax.bias"], segment.targets.t().contiguous(), share)
    return _Softmax.apply(x, *own), RecurrentState(tuple(h), tuple(c)).detach()
