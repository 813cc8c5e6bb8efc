"""The output layer in plain operations: tied (adaptive) softmax, per-lane weights.

Letters: B lanes, T time, E embedding, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.extensions import at_once
from mlm.extensions.phrases import AGAIN
from mlm.extensions.surprise import inner_total
from mlm.models import softmax
from mlm.models.language_model import Weights
from mlm.models.low_rank import _along, _linear, _low_rank, _turned
from mlm.models.recurrence import is_plain


class OutputShape(Protocol):
    """Sizes of the output layer."""

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """Adaptive softmax: ends (word ids) of the head and of all tails but the last; () = full."""
        ...

    def clusters(self) -> list[tuple[int, int, int]]:
        """(first id, end id, embedding size) of the head and the tails of the softmax."""
        ...


def _fused_nll(
    weights: Weights, shape: OutputShape, output_BTE: Tensor, targets_BT: Tensor, weights_BT: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`weighted_nll` by the fused softmax; None where it cannot serve (it is never adaptive)."""
    bias, low, slope = (weights.get(f"softmax.{which}") for which in ("bias", "low", "surprise"))
    assert bias is not None
    turned = low if _turned(weights, "softmax") else None
    if turned is None:
        layer = softmax.Layer(weights["embedding"], bias, low, slope=slope)
    else:
        related = weights.get("softmax.related")
        layer = softmax.Layer(turned, bias, None, related, slope, _at_once(weights))
    if shape.cutoffs or is_plain() or not softmax.supports(output_BTE, layer):
        return None
    projected = _along(weights, "softmax", output_BTE)
    if turned is not None and projected is not None:
        output_BTE, projected = projected, None
    return softmax.weighted_nll(output_BTE, layer, projected, targets_BT, weights_BT)


def weighted_nll(
    weights: Weights, shape: OutputShape, output_BTE: Tensor, targets_BT: Tensor, weights_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses (B, T) in nats and their differentiable sum weighted by `weights_BT`, of
    `surprise.inner_total` where that is how they teach.

    The losses are detached but within `plain_operations`.
    """
    fused = _fused_nll(weights, shape, output_BTE, targets_BT, weights_BT)
    if fused is not None:
        return fused
    nll = token_nll(weights, shape, output_BTE, targets_BT, weights_BT)
    total = inner_total(nll, weights_BT, weights.get("softmax.surprise"))
    return nll if is_plain() else nll.detach(), total


def _at_once(weights: Weights) -> at_once.Teaching | None:
    """How words teach at once, where an output layer of each lane does so."""
    rows, columns = (weights.get(f"softmax.once.{which}") for which in ("rows", "columns"))
    if rows is None or columns is None or weights["softmax.low"].dim() == 2:
        return None
    related, twice, slope = (
        weights.get(f"softmax.{which}") for which in ("related", "once.twice", "once.surprise")
    )
    return at_once.Teaching(rows, columns, related, twice, weights.get(AGAIN), slope)


def token_nll(
    weights: Weights,
    shape: OutputShape,
    output_BTE: Tensor,
    targets_BT: Tensor,
    share_BT: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood in nats (B, T) under the tied (adaptive) softmax.

    `share_BT`: what each token weighs for those after it, where it teaches at once; None = 1/T.
    """
    share = share_BT
    if share is None:
        share = torch.full_like(output_BTE[..., 0], 1 / targets_BT.shape[1])
    if not torch.is_grad_enabled():
        fused = _fused_nll(weights, shape, output_BTE, targets_BT, share)
        if fused is not None:
            return fused[0]
    logits = _logits(weights, shape, output_BTE)
    if not shape.cutoffs:
        keys = _along(weights, "softmax", output_BTE)
        by = None if keys is None else _at_once(weights)
        if keys is not None and by is not None:
            logits = at_once.corrected(logits, targets_BT, keys, by, share)
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


def _logits(weights: Weights, shape: OutputShape, output_BTE: Tensor) -> Tensor:
    """(B, T, V), of an adaptive softmax those of its head."""
    bias = weights["softmax.bias"]
    head = weights["embedding"]
    if shape.cutoffs:
        cluster = weights["softmax.cluster"]
        if head.dim() > cluster.dim():
            cluster = cluster.expand(head.shape[0], *cluster.shape)
        elif cluster.dim() > head.dim():
            head = head.expand(cluster.shape[0], *head.shape)
        head = torch.cat([head, cluster], dim=-2)
    if _turned(weights, "softmax"):
        logits = _low_rank(weights, "softmax", output_BTE)
        assert logits is not None
        logits = at_once.spread(logits, weights.get("softmax.related"))
    else:
        logits = _linear(output_BTE, head)
        low = _low_rank(weights, "softmax", output_BTE)  # of an adaptive softmax, of the head
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
