"""The softmax layer and its gradient in one go, a group of lanes at a time.

The loss of reading is a weighted sum of token losses, so the gradient of every logit is known as
soon as its row is: logits turn into gradients in place, no autograd graph holds (B, T, V).
Letters: B lanes, T time, E embedding, V vocabulary, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm import kernels
from mlm.extensions import at_once
from mlm.extensions.surprise import inner_total
from mlm.kernels.bfloat16 import done, lowered, product
from mlm.kernels.buffers import give, take

LOGITS = 1 << 24
"""Logits worked on together, 64 MB in float32. Fewer, and a large vocabulary's table is read again
too often: at 33,000 words 4 MB at a time took twice as long."""


class Layer(NamedTuple):
    """Weights of the softmax layer; each shared or with a leading B."""

    head: Tensor
    """(V, E): logits = output head^T + bias."""
    bias: Tensor
    """(V)."""
    low: Tensor | None = None
    """(V, R): logits += projected low^T, a low-rank part of the head."""
    related: Tensor | None = None
    """(V, S), Q, shared: logits = (I + Q Q^T) (output head^T) + bias (`mlm.extensions.related`)."""
    slope: Tensor | None = None
    """(2), shared: how a token's loss counts for what it teaches (`mlm.extensions.surprise`)."""
    teaching: at_once.Teaching | None = None
    """How words teach at once: constants."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but those of `teaching`."""
        return self[:-1]

    def biases(self) -> Tensor:
        """(1 or B, V)."""
        return self.bias.unsqueeze(0) if self.bias.dim() == 1 else self.bias


def supports(output_BTE: Tensor, layer: Layer) -> bool:
    """Whether `weighted_nll` can serve: on the CPU, shared tensors (but Q) without gradient."""
    present = [t for t in (*layer.tensors(), *(layer.teaching or ())) if t is not None]
    shared = (2, 1, 2)
    learned = [
        t.dim() == dim
        for t, dim in zip(layer.tensors(), shared, strict=False)
        if t is not None and torch.is_grad_enabled() and t.requires_grad
    ]
    return (
        kernels.usable(output_BTE, *present)
        and len({t.dtype for t in (output_BTE, *present)}) == 1
        and not torch.is_autocast_enabled("cpu")
        and not any(learned)
    )


def weighted_nll(
    output_BTE: Tensor,
    layer: Layer,
    projected_BTR: Tensor | None,
    targets_BT: Tensor,
    weights_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """Token losses and their weighted sum.

    Args:
        output_BTE: what the LSTM puts out; `projected_BTR` the same along the low-rank directions.
        weights_BT: of every token's loss in the sum.

    Returns:
        losses (B, T) in nats, outside the autograd graph, and sum(weights * losses), or
        `surprise.inner_total` where `layer` has a slope, which is differentiable once in
        `output_BTE`, `projected_BTR`, per-lane tensors of `layer` and Q, what words have taught at
        once being a constant. The weights are 1/T there, or 0 where a token does not teach.
    """
    tensors = [output_BTE, *layer.tensors(), projected_BTR]
    if not torch.is_grad_enabled():  # autograd.Function looks at requires_grad alone
        tensors = [None if t is None else t.detach() for t in tensors]
    more = (layer.teaching, targets_BT, weights_BT)
    return _WeightedNLL.apply(*tensors, *more)  # type: ignore[return-value]


def _product(x_BTE: Tensor, head: Tensor, out: Tensor) -> None:
    """out = x head^T for a shared (V, E) or per-lane (B, V, E) head."""
    if head.dim() == 2:
        product(x_BTE.flatten(0, 1), head.t(), out.flatten(0, 1))
    else:
        product(x_BTE, head.transpose(1, 2), out)


def _rows(
    logits: Tensor,
    layer: Layer,
    targets_BT: Tensor,
    weights_BT: Tensor,
    nll_BT: Tensor,
    bias_gradient: Tensor | None,
    slope: Tensor | None,
    want_gradient: bool,
) -> None:
    """Losses of `logits` (B, T, V) and, in their place, the gradient of the weighted sum."""
    kernels.share_out(
        kernels.softmax_rows,
        len(logits),
        4 * logits.numel(),
        logits,
        targets_BT.contiguous(),
        weights_BT.contiguous(),
        layer.biases(),
        nll_BT,
        nll_BT.new_empty(0, 0) if bias_gradient is None else bias_gradient,
        nll_BT.new_empty(0) if slope is None else slope,
        want_gradient,
    )


def _lose(logits: Tensor, lost: Tensor, layer: Layer, targets_BT: Tensor, nll_BT: Tensor) -> None:
    """Take from `logits` (B, T, V), of losses nll, what was taught at once, within its bounds."""
    kernels.share_out(
        kernels.teach_rows,
        len(logits),
        logits.numel(),
        logits,
        lost,
        targets_BT.contiguous(),
        layer.biases(),
        nll_BT,
        at_once.MOST,
    )


def _spread(x_V: Tensor, related: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x (I + Q Q^T) of contiguous vectors (..., V), in place: related words move together.

    Returns what was there, (N, V), if it is to be kept, and its product with Q, (N, S).
    """
    flat = x_V.flatten(0, -2)
    before = flat.clone() if keep else flat
    along_NS = product(flat, related, flat.new_empty(len(flat), related.shape[1]))
    product(along_NS, related.t(), flat, add=True)
    return before, along_NS


SUMS = ("bias", "related")
"""What gradients are added to; others are written."""


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        head: Tensor,
        bias: Tensor,
        low: Tensor | None,
        related: Tensor | None,
        slope: Tensor | None,
        projected: Tensor | None,
        teaching: at_once.Teaching | None,
        targets: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        lanes, steps, _ = output.shape
        output, weights = output.contiguous(), weights.to(output.dtype)
        layer = Layer(head, bias, low, related, slope)
        names = ("output", *Layer._fields[:-1], "projected")
        inputs = zip(names, (output, *layer.tensors(), projected), strict=True)
        found = {
            name: torch.zeros_like(x) if name in SUMS else take(tuple(x.shape), x)
            for (name, x), want in zip(inputs, ctx.needs_input_grad, strict=False)
            if want and x is not None
        }
        nll = output.new_empty(lanes, steps)
        group = max(1, min(lanes, LOGITS // (steps * head.shape[-2])))
        buffer = take((group, steps, head.shape[-2]), output)
        spare = None if teaching is None else take(tuple(buffer.shape), buffer)
        for lo in range(0, lanes, group):
            block = slice(lo, min(lo + group, lanes))
            own = Layer(
                head if head.dim() == 2 else head[block],
                bias if bias.dim() == 1 else bias[block],
                low if low is None or low.dim() == 2 else low[block],
            )
            some = {name: g if name == "related" else g[block] for name, g in found.items()}
            logits, keys, table = buffer[: block.stop - lo], output[block], lowered(own.head)
            _product(keys, table, logits)
            if own.low is not None and projected is not None:
                low_BRV = own.low.transpose(-1, -2).expand(len(logits), -1, -1)
                logits.baddbmm_(projected[block], low_BRV)
            spreads = [] if related is None else [_spread(logits, related, "related" in some)]
            here = targets[block], weights[block], nll[block]
            if teaching is not None and spare is not None:
                error, logits = logits, spare[: len(logits)].copy_(logits)
                _rows(error, own, *here, None, teaching.slope, True)
                lost = at_once.taught(error, keys, teaching.of(block))
                _lose(logits, lost, own, targets[block], nll[block])
                give([lost])
            _rows(logits, own, *here, some.get("bias"), slope, bool(found))
            if related is not None and found:  # the gradient is spread: the map is symmetric
                spreads.append(_spread(logits, related, "related" in some))
                if "related" in some:
                    (x, along), (g, back) = spreads
                    product(x.t(), back, some["related"], add=True)
                    product(g.t(), along, some["related"], add=True)
            moves = lowered(logits) if {"output", "head"} & some.keys() else logits
            if "output" in some:
                _product(moves, table.transpose(-1, -2), some["output"])
            if "head" in some:
                product(moves.transpose(1, 2), keys, some["head"])
            if projected is not None and "low" in some:
                torch.bmm(logits.transpose(1, 2), projected[block], out=some["low"])
            if own.low is not None and "projected" in some:
                torch.matmul(logits, own.low, out=some["projected"])
            done(moves, logits)
            done(table, own.head)
        give([buffer] if spare is None else [buffer, spare])
        ctx.found = [found.get(name) for name in names]
        ctx.mark_non_differentiable(nll)
        return nll, inner_total(nll, weights, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        scale = float(grads[1])
        found, ctx.found = ctx.found, None
        found = [g if g is None or scale == 1 else g * scale for g in found]
        return (*found, None, None, None)
