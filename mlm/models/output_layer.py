"""The output layer: tied (adaptive) softmax with per-lane weights, in plain operations and fused.

The loss of reading is a weighted sum of token losses, so the gradient of every logit is known as
soon as its row is: in the fused form logits turn into gradients in place, a group of lanes at a
time, and no autograd graph holds (B, T, V).
Letters: B lanes, T time, E embedding, I inputs in a basis, S directions, V vocabulary, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm import kernels
from mlm.kernels.bfloat16 import lowered, product, release_lowered
from mlm.kernels.buffers import acquire, release
from mlm.models.language_model import (
    OutputTerms,
    Weights,
    WithinSegment,
    gradient_share,
    weighted_total,
)
from mlm.models.low_rank import along_directions, coupled, is_folded, linear, low_rank_product
from mlm.models.recurrence import is_plain

NO_TERMS = OutputTerms()
MOST_TAUGHT = 10.0
"""Nats by which a logit falls at most within a segment."""


# -- words that teach the words behind them in a segment ----------------------------------------


class Teaching(NamedTuple):
    """How words teach within a segment; all of it shared by the lanes but `repeats`."""

    within: WithinSegment
    coupling: Tensor | None = None
    repeats: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return (*self.within, self.coupling, self.repeats)

    def of(self, lanes: slice) -> Teaching:
        """For some of the lanes."""
        return self if self.repeats is None else self._replace(repeats=self.repeats[lanes])


def teaching(weights: Weights, terms: OutputTerms) -> Teaching | None:
    """How words teach within the segment, where an output layer of each lane learns so."""
    if terms.within is None or weights["softmax.low"].dim() == 2:
        return None
    return Teaching(terms.within, terms.coupling, terms.repeats)


def similarity(keys_BTI: Tensor, columns: Tensor) -> Tensor:
    """k_s . (c * k_t) + d for words t (rows) and s < t (columns), else 0: (B, T, T)."""
    inner_BTT = (keys_BTI * columns[:-1]) @ keys_BTI.transpose(1, 2) + columns[-1]
    return inner_BTT.tril(-1)


def taught_logits(error_BTV: Tensor, keys_BTI: Tensor, by: Teaching) -> Tensor:
    """What the logits lose before it is bounded, (B, T, V), of errors e; no gradient."""
    similar_BTT = similarity(keys_BTI, by.within.columns)
    lower_BTV = lowered(error_BTV)
    lost_BTV = product(similar_BTT, lower_BTV, acquire(tuple(error_BTV.shape), error_BTV))
    if by.coupling is not None and by.within.square is not None:
        along_NS = similar_BTT.new_empty(similar_BTT[..., 0].numel(), by.coupling.shape[1])
        product(lower_BTV.flatten(0, 1), by.coupling, along_NS)
        along_BTS = torch.bmm(similar_BTT, along_NS.view(*similar_BTT.shape[:2], -1))
        product(along_BTS.flatten(0, 1), by.within.square.t(), lost_BTV.flatten(0, 1), add=True)
    lost_BTV.mul_(by.within.rows)
    if by.repeats is not None:  # e weighs 1/T
        product(by.repeats * by.repeats.shape[1], lower_BTV, lost_BTV, add=True)
    release_lowered(lower_BTV, error_BTV)
    return lost_BTV


def after_teaching(
    logits_BTV: Tensor, targets_BT: Tensor, keys_BTI: Tensor, by: Teaching, share_BT: Tensor
) -> Tensor:
    """Logits (B, T, V) of a segment whose words have taught those behind them.

    No e_s is looked at again after other words have taught, so a word that comes ten times would be
    learned ten times. Therefore a logit rises by -log p_t at most, to where its word is as likely
    as all others together, and falls by `MOST_TAUGHT` at most.

    Args:
        share_BT: what each token's loss weighs.
    """
    with torch.no_grad():
        log_p = logits_BTV.log_softmax(-1)
        one_hot = F.one_hot(targets_BT, logits_BTV.shape[-1])
        nll_BT = -log_p.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
        error_BTV = log_p.exp() - one_hot
        error_BTV *= gradient_share(nll_BT, share_BT, by.within.slope).unsqueeze(-1)
        lost = taught_logits(error_BTV, keys_BTI, by)
        lost = torch.maximum(lost.clamp(max=MOST_TAUGHT), log_p)
    return logits_BTV - lost


# -- the fused softmax --------------------------------------------------------------------------

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
    coupling: Tensor | None = None
    """(V, S), Q, shared: logits = (I + Q Q^T) (output head^T) + bias."""
    slope: Tensor | None = None
    """(2), shared: `OutputTerms.slope`."""
    teaching: Teaching | None = None
    """How words teach within the segment: constants."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but those of `teaching`."""
        return self[:-1]

    def biases(self) -> Tensor:
        """(1 or B, V)."""
        return self.bias.unsqueeze(0) if self.bias.dim() == 1 else self.bias


def supports(output_BTE: Tensor, layer: Layer) -> bool:
    """Whether `fused_nll` can serve: on the CPU, shared tensors (but Q) without gradient."""
    present = [
        t
        for t in (*layer.tensors(), *(layer.teaching.tensors() if layer.teaching else ()))
        if t is not None
    ]
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


def fused_nll(
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
        losses (B, T) in nats, outside the autograd graph, and their `weighted_total`, which is
        differentiable once in `output_BTE`, `projected_BTR`, per-lane tensors of `layer` and Q;
        what words taught within the segment is a constant. Where they do, the weights are 1/T, or
        0 where a token does not teach.
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
    """Take from `logits` (B, T, V), of losses nll, what the segment taught, within its bounds."""
    kernels.share_out(
        kernels.teach_rows,
        len(logits),
        logits.numel(),
        logits,
        lost,
        targets_BT.contiguous(),
        layer.biases(),
        nll_BT,
        MOST_TAUGHT,
    )


def _spread(x_V: Tensor, coupling: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x (I + Q Q^T) of contiguous vectors (..., V), in place.

    Returns what was there, (N, V), if it is to be kept, and its product with Q, (N, S).
    """
    flat = x_V.flatten(0, -2)
    before = flat.clone() if keep else flat
    along_NS = product(flat, coupling, flat.new_empty(len(flat), coupling.shape[1]))
    product(along_NS, coupling.t(), flat, add=True)
    return before, along_NS


SUMS = ("bias", "coupling")
"""What gradients are added to; others are written."""


class _WeightedNLL(torch.autograd.Function):
    # long: what a group of lanes needs is used once, in this order; parts would hand on ten tensors
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        head: Tensor,
        bias: Tensor,
        low: Tensor | None,
        coupling: Tensor | None,
        slope: Tensor | None,
        projected: Tensor | None,
        teaching: Teaching | None,
        targets: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        lanes, steps, _ = output.shape
        output, weights = output.contiguous(), weights.to(output.dtype)
        layer = Layer(head, bias, low, coupling, slope)
        names = ("output", *Layer._fields[:-1], "projected")
        inputs = zip(names, (output, *layer.tensors(), projected), strict=True)
        found = {
            name: torch.zeros_like(x) if name in SUMS else acquire(tuple(x.shape), x)
            for (name, x), want in zip(inputs, ctx.needs_input_grad, strict=False)
            if want and x is not None
        }
        nll = output.new_empty(lanes, steps)
        group = max(1, min(lanes, LOGITS // (steps * head.shape[-2])))
        buffer = acquire((group, steps, head.shape[-2]), output)
        spare = None if teaching is None else acquire(tuple(buffer.shape), buffer)
        for lo in range(0, lanes, group):
            block = slice(lo, min(lo + group, lanes))
            own = Layer(
                head if head.dim() == 2 else head[block],
                bias if bias.dim() == 1 else bias[block],
                low if low is None or low.dim() == 2 else low[block],
            )
            some = {name: g if name == "coupling" else g[block] for name, g in found.items()}
            logits, keys, table = buffer[: block.stop - lo], output[block], lowered(own.head)
            _product(keys, table, logits)
            if own.low is not None and projected is not None:
                low_BRV = own.low.transpose(-1, -2).expand(len(logits), -1, -1)
                logits.baddbmm_(projected[block], low_BRV)
            spreads = [] if coupling is None else [_spread(logits, coupling, "coupling" in some)]
            here = targets[block], weights[block], nll[block]
            if teaching is not None and spare is not None:
                error, logits = logits, spare[: len(logits)].copy_(logits)
                _rows(error, own, *here, None, teaching.within.slope, True)
                lost = taught_logits(error, keys, teaching.of(block))
                _lose(logits, lost, own, targets[block], nll[block])
                release([lost])
            _rows(logits, own, *here, some.get("bias"), slope, bool(found))
            if coupling is not None and found:  # the gradient is spread: the map is symmetric
                spreads.append(_spread(logits, coupling, "coupling" in some))
                if "coupling" in some:
                    (x, along), (g, back) = spreads
                    product(x.t(), back, some["coupling"], add=True)
                    product(g.t(), along, some["coupling"], add=True)
            moves = lowered(logits) if {"output", "head"} & some.keys() else logits
            if "output" in some:
                _product(moves, table.transpose(-1, -2), some["output"])
            if "head" in some:
                product(moves.transpose(1, 2), keys, some["head"])
            if projected is not None and "low" in some:
                torch.bmm(logits.transpose(1, 2), projected[block], out=some["low"])
            if own.low is not None and "projected" in some:
                torch.matmul(logits, own.low, out=some["projected"])
            release_lowered(moves, logits)
            release_lowered(table, own.head)
        release([buffer] if spare is None else [buffer, spare])
        ctx.found = [found.get(name) for name in names]
        ctx.mark_non_differentiable(nll)
        return nll, weighted_total(nll, weights, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        scale = float(grads[1])
        found, ctx.found = ctx.found, None
        found = [g if g is None or scale == 1 else g * scale for g in found]
        return (*found, None, None, None)


# -- plain operations ---------------------------------------------------------------------------


class OutputShape(Protocol):
    """Sizes of the output layer."""

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """Adaptive softmax: ends (word ids) of the head and of all tails but the last."""
        ...

    def clusters(self) -> list[tuple[int, int, int]]:
        """(first id, end id, embedding size) of the head and the tails of the softmax."""
        ...


def _fused(
    weights: Weights,
    shape: OutputShape,
    output_BTE: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    terms: OutputTerms,
) -> tuple[Tensor, Tensor] | None:
    """`weighted_nll` by the fused softmax; None where it cannot serve (it is never adaptive)."""
    bias, low = weights["softmax.bias"], weights.get("softmax.low")
    folded = low if is_folded(weights, "softmax") else None
    if folded is None:
        layer = Layer(weights["embedding"], bias, low, slope=terms.slope)
    else:
        taught = teaching(weights, terms)
        layer = Layer(folded, bias, None, terms.coupling, terms.slope, taught)
    if shape.cutoffs or is_plain() or not supports(output_BTE, layer):
        return None
    projected = along_directions(weights, "softmax", output_BTE)
    if folded is not None and projected is not None:
        output_BTE, projected = projected, None
    return fused_nll(output_BTE, layer, projected, targets_BT, weights_BT)


def weighted_nll(
    weights: Weights,
    shape: OutputShape,
    output_BTE: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    terms: OutputTerms = NO_TERMS,
) -> tuple[Tensor, Tensor]:
    """Losses (B, T) in nats, detached but within `plain_operations`, and their differentiable
    `total` with the shares `weights_BT`."""
    fused = _fused(weights, shape, output_BTE, targets_BT, weights_BT, terms)
    if fused is not None:
        return fused
    nll = token_nll(weights, shape, output_BTE, targets_BT, weights_BT, terms)
    total = weighted_total(nll, weights_BT, terms.slope)
    return nll if is_plain() else nll.detach(), total


def token_nll(
    weights: Weights,
    shape: OutputShape,
    output_BTE: Tensor,
    targets_BT: Tensor,
    share_BT: Tensor | None = None,
    terms: OutputTerms = NO_TERMS,
) -> Tensor:
    """Negative log-likelihood in nats (B, T) under the tied (adaptive) softmax.

    `share_BT`: what each token weighs for those after it within the segment; None = 1/T.
    """
    share = share_BT
    if share is None:
        share = torch.full_like(output_BTE[..., 0], 1 / targets_BT.shape[1])
    if not torch.is_grad_enabled():
        fused = _fused(weights, shape, output_BTE, targets_BT, share, terms)
        if fused is not None:
            return fused[0]
    logits = token_logits(weights, shape, output_BTE, targets_BT, share, terms)
    if not shape.cutoffs:
        flat = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none")
        return flat.view_as(targets_BT)
    first = shape.cutoffs[0]
    log_p = F.log_softmax(logits, dim=-1)
    index = targets_BT.clamp(max=first - 1)
    for k, (lo, hi, _) in enumerate(shape.clusters()[1:]):
        index = torch.where((targets_BT >= lo) & (targets_BT < hi), first + k, index)
    nll = -log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    for k, (lo, hi, _) in enumerate(shape.clusters()[1:], start=1):
        nll = _add_tail(nll, weights, k, output_BTE, targets_BT - lo, hi - lo)
    return nll


def token_logits(
    weights: Weights,
    shape: OutputShape,
    output_BTE: Tensor,
    targets_BT: Tensor,
    share_BT: Tensor,
    terms: OutputTerms,
) -> Tensor:
    """(B, T, V), of an adaptive softmax those of its head; arguments as in `token_nll`.

    A token's logits depend on the targets before it only, which teach within the segment.
    """
    logits = _logits(weights, shape, output_BTE, terms.coupling)
    keys = None if shape.cutoffs else along_directions(weights, "softmax", output_BTE)
    by = None if keys is None else teaching(weights, terms)
    if keys is None or by is None:
        return logits
    return after_teaching(logits, targets_BT, keys, by, share_BT)


def _logits(
    weights: Weights, shape: OutputShape, output_BTE: Tensor, coupling: Tensor | None
) -> Tensor:
    """`token_logits` before words teach within the segment."""
    bias = weights["softmax.bias"]
    head = weights["embedding"]
    if shape.cutoffs:
        cluster = weights["softmax.cluster"]
        if head.dim() > cluster.dim():
            cluster = cluster.expand(head.shape[0], *cluster.shape)
        elif cluster.dim() > head.dim():
            head = head.expand(cluster.shape[0], *head.shape)
        head = torch.cat([head, cluster], dim=-2)
    if is_folded(weights, "softmax"):
        logits = low_rank_product(weights, "softmax", output_BTE)
        assert logits is not None
        logits = coupled(logits, coupling)
    else:
        logits = linear(output_BTE, head)
        low = low_rank_product(
            weights, "softmax", output_BTE
        )  # of an adaptive softmax, of the head
        logits = logits if low is None else logits + low
    logits = logits + (bias if bias.dim() == 1 else bias.unsqueeze(1))
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def _add_tail(
    nll_BT: Tensor, weights: Weights, k: int, output_BTE: Tensor, inside_BT: Tensor, size: int
) -> Tensor:
    """Add -log p(word | tail cluster k) to the positions whose target lies in it."""
    chosen = (inside_BT >= 0) & (inside_BT < size)
    if not bool(chosen.any()):
        return nll_BT
    names = (f"projection.tail{k}", f"embedding.tail{k}", f"softmax.tail{k}.bias")
    projection, table, bias = (weights[name] for name in names)
    per_lane = projection.dim() == 3 or table.dim() == 3 or bias.dim() == 2
    pieces = []
    for lane in range(nll_BT.shape[0]) if per_lane else [slice(None)]:
        rows = output_BTE[lane][chosen[lane]]
        target = inside_BT[lane][chosen[lane]]
        p, e, b = (
            w[lane] if w.dim() > shared else w
            for w, shared in ((projection, 2), (table, 2), (bias, 1))
        )
        logits = (rows @ p) @ e.t() + b
        pieces.append(
            F.cross_entropy(
                logits.float() if logits.dtype == torch.bfloat16 else logits,
                target,
                reduction="none",
            )
        )
    return nll_BT.masked_scatter(chosen, nll_BT[chosen] + torch.cat(pieces))
