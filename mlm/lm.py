"""The base language model as functions of explicit weights (short-term memory).

A standard LSTM with tied embedding and softmax (AWD-LSTM, Merity et al. 2018). Weights are a
plain dict of tensors; each tensor is either shared by all lanes or has a leading lane dimension,
so static training, scoring and reading with a memory in the weights are the same functions.
A matrix `name` may come with a low-rank change `name.low` (see `mlm.lowrank`).

Letters: B lanes, T time, E embedding, H hidden, V vocabulary, L layers, r rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm import softmax
from mlm.recurrence import is_plain, lane_lstm

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class LMShape:
    """Sizes of the language model. The last layer's outputs have the embedding's size (tying)."""

    vocabulary: int
    embedding: int
    hidden: int
    layers: int
    cutoffs: tuple[int, ...] = ()
    """Adaptive softmax: ends (word ids) of the head and of all tails but the last; () = full."""

    def layer_sizes(self) -> list[tuple[int, int]]:
        """(input size, hidden size) of each layer."""
        sizes = [self.embedding, *[self.hidden] * (self.layers - 1), self.embedding]
        return list(itertools.pairwise(sizes))

    def clusters(self) -> list[tuple[int, int, int]]:
        """(first id, end id, embedding size) of the head and the tails of the softmax."""
        edges = [0, *self.cutoffs, self.vocabulary]
        return [
            (lo, hi, max(1, self.embedding // 4**k))
            for k, (lo, hi) in enumerate(itertools.pairwise(edges))
        ]

    # -- what reading needs of any language model (`mlm.rollout`) ---------------------------

    def initial_state(
        self, lanes: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LMState:
        """A zero state for `lanes` articles about to begin."""
        return initial_state(self, lanes, device, dtype)

    def read(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: LMState,
        share_BT: Tensor | None = None,
    ) -> Read:
        """Predict a segment; every weight is shared or has a leading B."""
        hidden = run_lstm(weights, self, tokens_BT, state)
        if share_BT is None:
            nll = token_nll(weights, self, hidden.output, targets_BT)
            return Read(nll, nll.new_zeros(()), hidden.output, hidden.state)
        nll, total = weighted_nll(weights, self, hidden.output, targets_BT, share_BT)
        return Read(nll, total, hidden.output, hidden.state)


class Read(NamedTuple):
    """A segment read by a language model."""

    nll: Tensor
    """(B, T) nats; differentiable only within `plain_operations` (mlm.recurrence)."""
    total: Tensor
    """Differentiable sum of nll times the shares that were asked for; zero without any."""
    output: Tensor
    """(B, T, E): what the softmax sees."""
    state: LMState
    """Short-term memory after the segment."""


class LMState(NamedTuple):
    """Hidden state of every layer: tuples of L tensors (B, H_l)."""

    h: tuple[Tensor, ...]
    c: tuple[Tensor, ...]

    def keep(self, keep_B: Tensor) -> LMState:
        """Zero the lanes where `keep_B` (B,) is False: a new article starts there."""
        mask = keep_B.to(self.h[0].dtype).unsqueeze(1)
        return LMState(tuple(h * mask for h in self.h), tuple(c * mask for c in self.c))

    def select(self, lanes: Tensor) -> LMState:
        """The state of some lanes (their indices)."""
        return LMState(tuple(h[lanes] for h in self.h), tuple(c[lanes] for c in self.c))

    def detach(self) -> LMState:
        """The same state without its autograd history."""
        return LMState(tuple(h.detach() for h in self.h), tuple(c.detach() for c in self.c))

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, for files."""
        return [*self.h, *self.c]

    def of(self, tensors: Sequence[Tensor]) -> LMState:
        """The state made of such `tensors`."""
        layers = len(self.h)
        return LMState(tuple(tensors[:layers]), tuple(tensors[layers:]))


@dataclass(frozen=True)
class Dropout:
    """AWD-LSTM regularisation rates (Merity et al. 2018, section 4): zero = off."""

    embedding: float = 0.0
    """Whole rows (words) of the input embedding."""
    input: float = 0.0
    """Locked dropout on the first layer's input."""
    hidden: float = 0.0
    """Locked dropout between layers."""
    output: float = 0.0
    """Locked dropout before the softmax."""
    weight: float = 0.0
    """DropConnect on the recurrent weights ("weight drop")."""


def initial_weights(shape: LMShape, generator: torch.Generator) -> Weights:
    """Fresh weights: uniform +-0.1 embeddings (AWD-LSTM), +-1/sqrt(H) LSTM, forget bias 1."""

    def uniform(bound: float, *size: int) -> Tensor:
        return (torch.rand(*size, generator=generator) * 2 - 1) * bound

    weights: Weights = {}
    for k, (lo, hi, width) in enumerate(shape.clusters()):
        if k == 0:
            weights["embedding"] = uniform(0.1, hi, width)
        else:
            weights[f"embedding.tail{k}"] = uniform(0.1, hi - lo, width)
            weights[f"projection.tail{k}"] = uniform(
                1 / math.sqrt(shape.embedding), shape.embedding, width
            )
            weights[f"softmax.tail{k}.bias"] = torch.zeros(hi - lo)
    tails = len(shape.cutoffs)
    if tails:
        weights["softmax.cluster"] = uniform(0.1, tails, shape.embedding)
    weights["softmax.bias"] = torch.zeros(shape.clusters()[0][1] + tails)
    for layer, (size, hidden) in enumerate(shape.layer_sizes()):
        bound = 1 / math.sqrt(hidden)
        weights[f"lstm.{layer}.input"] = uniform(bound, 4 * hidden, size)
        weights[f"lstm.{layer}.recurrent"] = uniform(bound, 4 * hidden, hidden)
        bias = torch.zeros(4 * hidden)
        bias[hidden : 2 * hidden] = 1.0
        weights[f"lstm.{layer}.bias"] = bias
    return weights


def initial_state(
    shape: LMShape,
    lanes: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LMState:
    """A zero state for `lanes` articles about to begin."""
    zeros = [torch.zeros(lanes, h, device=device, dtype=dtype) for _, h in shape.layer_sizes()]
    return LMState(tuple(zeros), tuple(torch.zeros_like(z) for z in zeros))


def _linear(x_BTI: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T for a shared (O, I) or a per-lane (B, O, I) weight."""
    return x_BTI @ weight.transpose(-1, -2)


def _along(weights: Weights, name: str, x_BTI: Tensor) -> Tensor | None:
    """x P^T, (B, T, r), for P = `name.directions` (r, I); None without a low-rank change."""
    directions = weights.get(f"{name}.directions")
    return None if directions is None else _linear(x_BTI, directions)


def _low_rank(weights: Weights, name: str, x_BTI: Tensor) -> Tensor | None:
    """x (D P)^T, (B, T, O): what the low-rank change of a matrix adds to its product with x.

    D = `name.low` is (O, r) or (B, O, r). None without it.
    """
    along = _along(weights, name, x_BTI)
    return None if along is None else _linear(along, weights[f"{name}.low"])


def _dense(weights: Weights, name: str) -> Tensor:
    """A matrix with its low-rank change folded in: W + D P, per lane where W or D is."""
    low = weights.get(f"{name}.low")
    return weights[name] if low is None else weights[name] + low @ weights[f"{name}.directions"]


def _lookup(table: Tensor, ids_BT: Tensor) -> Tensor:
    """Rows of a shared (V, E) or per-lane (B, V, E) table -> (B, T, E)."""
    if table.dim() == 2:
        return F.embedding(ids_BT, table)
    lanes, size, width = table.shape
    offset = torch.arange(lanes, device=ids_BT.device).unsqueeze(1) * size
    return F.embedding(ids_BT + offset, table.reshape(lanes * size, width))


def embed(weights: Weights, shape: LMShape, tokens_BT: Tensor) -> Tensor:
    """Input embedding (B, T, E); tails are narrow tables projected up (Baevski & Auli 2019)."""
    if not shape.cutoffs:
        return _lookup(weights["embedding"], tokens_BT)
    first = shape.cutoffs[0]
    out = _lookup(weights["embedding"], tokens_BT.clamp(max=first - 1))
    for k, (lo, hi, _) in enumerate(shape.clusters()[1:], start=1):
        inside = (tokens_BT >= lo) & (tokens_BT < hi)
        rows = _lookup(weights[f"embedding.tail{k}"], (tokens_BT - lo).clamp(0, hi - lo - 1))
        out = torch.where(inside.unsqueeze(-1), _linear(rows, weights[f"projection.tail{k}"]), out)
    return out


def _locked(x_BTE: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Locked (variational) dropout: one mask per lane, the same at every step."""
    if not rate:
        return x_BTE
    keep = torch.rand(
        x_BTE.shape[0], 1, x_BTE.shape[2], generator=generator, device=x_BTE.device
    ).ge(rate)
    return x_BTE * (keep.to(x_BTE.dtype) / (1 - rate))


def _drop_words(table: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    if not rate:
        return table
    keep = torch.rand(table.shape[0], 1, generator=generator, device=table.device).ge(rate)
    return table * (keep.to(table.dtype) / (1 - rate))


def _layer(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    h: Tensor,
    c: Tensor,
    extra_BTG: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer: the library's fused kernel where all weights are shared, else the engine.

    `extra_BTG` (B, T, 4H) is added to the input projection.
    """
    w_input, w_recurrent, bias = weights
    shared = w_input.dim() == w_recurrent.dim() == 2 and bias.dim() == 1
    if shared and extra_BTG is None and not is_plain():
        flat = [w_input, w_recurrent, bias, torch.zeros_like(bias)]
        state = (h.unsqueeze(0), c.unsqueeze(0))
        grad = torch.is_grad_enabled()
        y, h_n, c_n = torch.lstm(x, state, flat, True, 1, 0.0, grad, False, True)
        return y, h_n.squeeze(0), c_n.squeeze(0)
    return lane_lstm(x, weights, h, c, extra_BTG)


def _input_weight(weights: Weights, layer: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(input matrix, what is added to its product with x) of a layer.

    A low-rank change per lane is cheaper as a term of its own; a shared one is folded in, so that
    static reading keeps the fused kernel.
    """
    name = f"lstm.{layer}.input"
    low = weights.get(f"{name}.low")
    if low is not None and low.dim() == 3:
        return weights[name], _low_rank(weights, name, x)
    return _dense(weights, name), None


class Hidden(NamedTuple):
    """Outputs of the LSTM."""

    output: Tensor
    """Last layer's outputs (B, T, E), after output dropout."""
    raw: Tensor
    """The same before dropout (for TAR, Merity et al. 2018)."""
    state: LMState
    layers: tuple[Tensor, ...]
    """Every layer's outputs (B, T, H_l), before dropout."""


def run_lstm(
    weights: Weights,
    shape: LMShape,
    tokens_BT: Tensor,
    state: LMState,
    dropout: Dropout | None = None,
    generator: torch.Generator | None = None,
) -> Hidden:
    """Read `tokens_BT` (B, T) from `state`; every weight is shared or has a leading B.

    A low-rank change of the recurrent weights is folded into them: a full matrix per lane, exact
    and no cheaper than one that adapts itself.
    `dropout` is for training with shared weights only; `generator` makes it repeatable.
    """
    drop = dropout or Dropout()
    if drop.embedding:
        weights = dict(weights)
        for name in [n for n in weights if n.startswith("embedding")]:
            weights[name] = _drop_words(weights[name], drop.embedding, generator)
    x = _locked(embed(weights, shape, tokens_BT), drop.input, generator)
    hs, cs, raws = [], [], []
    for layer in range(shape.layers):
        recurrent = _dense(weights, f"lstm.{layer}.recurrent")
        if drop.weight:
            keep = torch.rand(recurrent.shape, generator=generator, device=recurrent.device)
            recurrent = recurrent * (keep.ge(drop.weight).to(recurrent.dtype) / (1 - drop.weight))
        w_input, extra = _input_weight(weights, layer, x)
        own = (w_input, recurrent, weights[f"lstm.{layer}.bias"])
        raw, h, c = _layer(x, own, state.h[layer], state.c[layer], extra)
        raws.append(raw)
        hs.append(h)
        cs.append(c)
        last = layer == shape.layers - 1
        x = _locked(raw, drop.output if last else drop.hidden, generator)
    return Hidden(x, raws[-1], LMState(tuple(hs), tuple(cs)), tuple(raws))


def _fused_nll(
    weights: Weights, shape: LMShape, output_BTE: Tensor, targets_BT: Tensor, weights_BT: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`weighted_nll` by the fused softmax; None where it cannot serve (it is never adaptive)."""
    layer = softmax.Layer(weights["embedding"], weights["softmax.bias"], weights.get("softmax.low"))
    if shape.cutoffs or is_plain() or not softmax.supports(output_BTE, layer):
        return None
    projected = _along(weights, "softmax", output_BTE)
    return softmax.weighted_nll(output_BTE, layer, projected, targets_BT, weights_BT)


def weighted_nll(
    weights: Weights, shape: LMShape, output_BTE: Tensor, targets_BT: Tensor, weights_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses (B, T) in nats and their differentiable sum weighted by `weights_BT`.

    The losses are detached but within `plain_operations`.
    """
    fused = _fused_nll(weights, shape, output_BTE, targets_BT, weights_BT)
    if fused is not None:
        return fused
    nll = token_nll(weights, shape, output_BTE, targets_BT)
    return nll if is_plain() else nll.detach(), (nll * weights_BT).sum()


def token_nll(weights: Weights, shape: LMShape, output_BTE: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood in nats (B, T) under the tied (adaptive) softmax."""
    if not torch.is_grad_enabled():
        ones = torch.ones_like(output_BTE[..., 0])
        fused = _fused_nll(weights, shape, output_BTE, targets_BT, ones)
        if fused is not None:
            return fused[0]
    bias = weights["softmax.bias"]
    head = weights["embedding"]
    if shape.cutoffs:
        cluster = weights["softmax.cluster"]
        if head.dim() > cluster.dim():
            cluster = cluster.expand(head.shape[0], *cluster.shape)
        elif cluster.dim() > head.dim():
            head = head.expand(cluster.shape[0], *head.shape)
        head = torch.cat([head, cluster], dim=-2)
    logits = _linear(output_BTE, head) + (bias if bias.dim() == 1 else bias.unsqueeze(1))
    low = _low_rank(weights, "softmax", output_BTE)  # of an adaptive softmax, to the head's logits
    logits = logits if low is None else logits + low
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if not shape.cutoffs:
        return F.cross_entropy(
            logits.flatten(0, 1), targets_BT.flatten(), reduction="none"
        ).view_as(targets_BT)
    first = shape.cutoffs[0]
    log_p = F.log_softmax(logits, dim=-1)
    index = targets_BT.clamp(max=first - 1)
    for k, (lo, hi, _) in enumerate(shape.clusters()[1:]):
        index = torch.where((targets_BT >= lo) & (targets_BT < hi), first + k, index)
    nll = -log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    for k, (lo, hi, _) in enumerate(shape.clusters()[1:], start=1):
        nll = _add_tail(nll, weights, k, output_BTE, targets_BT - lo, hi - lo)
    return nll


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


def score(
    weights: Weights, shape: LMShape, tokens_BT: Tensor, targets_BT: Tensor, state: LMState
) -> tuple[Tensor, LMState]:
    """Loss of every token, (B, T) in nats, and the state after the segment."""
    hidden = run_lstm(weights, shape, tokens_BT, state)
    return token_nll(weights, shape, hidden.output, targets_BT), hidden.state
