"""The base language models as functions of explicit weights (short-term memory).

`LanguageModel` is what reading needs of any model. Here are those with recurrent layers: a
standard LSTM or QRNN with tied embedding and softmax (AWD-LSTM and AWD-QRNN, Merity et al. 2018).
Weights are a plain dict of tensors; each tensor is either shared by all lanes or has a leading lane
dimension, so static training, scoring and reading with a memory in the weights are the same
functions. A matrix `name` may come with a low-rank change `name.low` (see
`mlm.models.low_rank`).

Letters: B lanes, T time, E embedding, H hidden, V vocabulary, L layers, r rank.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.models.language_model import OutputTerms, Read, State, Tell, Weights
from mlm.models.low_rank import dense, is_folded, linear, low_rank_product
from mlm.models.output_layer import token_logits, token_nll, weighted_nll
from mlm.models.recurrence import is_plain, lane_lstm, lane_qrnn

Layout = dict[str, tuple[tuple[int, ...], float]]
"""Of every weight: its size, and the bound of its uniform initial values (0 = it starts at 0)."""


EMBEDDING_BOUND = 0.1
"""Of the initial embedding and softmax (AWD-LSTM)."""


S = TypeVar("S", bound=State)


class Hidden(NamedTuple, Generic[S]):
    """Outputs of the layers below the softmax."""

    output: Tensor
    """Last layer's outputs (B, T, E), after output dropout."""
    raw: Tensor
    """The same before dropout (for TAR, Merity et al. 2018)."""
    state: S
    layers: tuple[Tensor, ...]
    """Every layer's outputs (B, T, H_l), before dropout."""


class BaseModel(ABC):
    """A language model that stage 1 trains: layers between a tied embedding and softmax.

    Subclasses are frozen dataclasses with these sizes; all weights are kept outside.
    """

    vocabulary: int
    embedding: int
    """The last layer's outputs have the embedding's size (tying)."""
    layers: int
    cutoffs: tuple[int, ...]
    """Adaptive softmax: ends (word ids) of the head and of all tails but the last; () = full."""

    @abstractmethod
    def layer_layout(self) -> Layout:
        """The weights of the layers."""

    @abstractmethod
    def initial_state(
        self, lanes: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state of `lanes` articles about to begin."""

    @abstractmethod
    def run(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        state: Any,
        dropout: Dropout | None = None,
        generator: torch.Generator | None = None,
    ) -> Hidden[Any]:
        """Read `tokens_BT` (B, T) from `state`; every weight is shared or has a leading B.

        `dropout` is for training with shared weights only; `generator` makes it repeatable.
        """

    def clusters(self) -> list[tuple[int, int, int]]:
        """(first id, end id, embedding size) of the head and the tails of the softmax."""
        edges = [0, *self.cutoffs, self.vocabulary]
        return [
            (lo, hi, max(1, self.embedding // 4**k))
            for k, (lo, hi) in enumerate(itertools.pairwise(edges))
        ]

    def layout(self) -> Layout:
        """All weights: embedding and softmax (+-0.1 as in AWD-LSTM), then the layers'."""
        found: Layout = {}
        for k, (lo, hi, width) in enumerate(self.clusters()):
            if k == 0:
                found["embedding"] = (hi, width), EMBEDDING_BOUND
            else:
                found[f"embedding.tail{k}"] = (hi - lo, width), EMBEDDING_BOUND
                found[f"projection.tail{k}"] = (
                    (self.embedding, width),
                    1 / math.sqrt(self.embedding),
                )
                found[f"softmax.tail{k}.bias"] = (hi - lo,), 0.0
        tails = len(self.cutoffs)
        if tails:
            found["softmax.cluster"] = (tails, self.embedding), EMBEDDING_BOUND
        found["softmax.bias"] = (self.clusters()[0][1] + tails,), 0.0
        return found | self.layer_layout()

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(math.prod(size) for size, _ in self.layout().values())

    def initial_weights(self, generator: torch.Generator) -> Weights:
        """Fresh weights."""
        return {
            name: (torch.rand(*size, generator=generator) * 2 - 1) * bound
            if bound
            else torch.zeros(size)
            for name, (size, bound) in self.layout().items()
        }

    def read(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: Any,
        share_BT: Tensor | None = None,
        tell: Tell | None = None,
        full: bool = False,
    ) -> Read:
        """See `LanguageModel.read`."""
        hidden = self.run(weights, tokens_BT, state)
        terms = OutputTerms() if tell is None else tell(hidden.output.detach())
        output = hidden.output if terms.added is None else hidden.output + terms.added
        log_p = None
        if full:
            share = torch.full_like(output[..., 0], 1 / tokens_BT.shape[1])
            share = share if share_BT is None else share_BT
            log_p = log_probabilities(weights, self, output.detach(), targets_BT, share, terms)
        if share_BT is None:
            nll = token_nll(weights, self, output, targets_BT, terms=terms)
            return Read(nll, nll.new_zeros(()), hidden.output, hidden.state, log_p)
        nll, total = weighted_nll(weights, self, output, targets_BT, share_BT, terms)
        return Read(nll, total, hidden.output, hidden.state, log_p)


@dataclass(frozen=True)
class RecurrentLM(BaseModel):
    """Sizes of a language model with recurrent layers."""

    vocabulary: int
    embedding: int
    hidden: int
    layers: int
    cutoffs: tuple[int, ...] = ()
    cell: Literal["lstm", "qrnn"] = "lstm"

    def layer_sizes(self) -> list[tuple[int, int]]:
        """(input size, hidden size) of each layer."""
        sizes = [self.embedding, *[self.hidden] * (self.layers - 1), self.embedding]
        return list(itertools.pairwise(sizes))

    def windows(self) -> list[int]:
        """Tokens under a QRNN layer's convolution: 2 in the first layer, 1 above (AWD-QRNN)."""
        return [2, *[1] * (self.layers - 1)]

    def layer_layout(self) -> Layout:
        """LSTM: +-1/sqrt(H). QRNN: +-1/sqrt(inputs). Biases are zero but for the forget gate's.

        The first LSTM layer's input matrix makes up for the small embedding it reads, or the gates
        would hardly see the words at first.
        """
        found: Layout = {}
        for layer, (size, hidden) in enumerate(self.layer_sizes()):
            if self.cell == "qrnn":
                inputs = self.windows()[layer] * size
                found[f"qrnn.{layer}.input"] = (3 * hidden, inputs), 1 / math.sqrt(inputs)
                found[f"qrnn.{layer}.bias"] = (3 * hidden,), 0.0
                continue
            bound = 1 / math.sqrt(hidden)
            awake = bound if layer else 1 / (EMBEDDING_BOUND * math.sqrt(size))
            found[f"lstm.{layer}.input"] = (4 * hidden, size), awake
            found[f"lstm.{layer}.recurrent"] = (4 * hidden, hidden), bound
            found[f"lstm.{layer}.bias"] = (4 * hidden,), 0.0
        return found

    def initial_weights(self, generator: torch.Generator) -> Weights:
        """Fresh weights; the bias of the forget gates, the second of either cell's, is 1."""
        weights = super().initial_weights(generator)
        for layer, (_, hidden) in enumerate(self.layer_sizes()):
            weights[f"{self.cell}.{layer}.bias"][hidden : 2 * hidden] = 1.0
        return weights

    def initial_state(
        self, lanes: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> RecurrentState:
        """A zero state for `lanes` articles about to begin."""

        def zeros(*sizes: int) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(lanes, n, device=device, dtype=dtype) for n in sizes)

        sizes = [hidden for _, hidden in self.layer_sizes()]
        if self.cell == "qrnn":
            return RecurrentState((), zeros(*sizes), zeros(self.embedding))
        return RecurrentState(zeros(*sizes), zeros(*sizes))

    def run(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        state: RecurrentState,
        dropout: Dropout | None = None,
        generator: torch.Generator | None = None,
    ) -> Hidden[RecurrentState]:
        """See `run_lstm`."""
        return run_lstm(weights, self, tokens_BT, state, dropout, generator)


@torch.no_grad()
def log_probabilities(
    weights: Weights,
    shape: BaseModel,
    output_BTE: Tensor,
    targets_BT: Tensor,
    share_BT: Tensor,
    terms: OutputTerms,
) -> Tensor:
    """(B, T, V): log-probabilities of every token, whose entries at the targets are minus
    `token_nll`, to rounding; arguments as there."""
    head = token_logits(weights, shape, output_BTE, targets_BT, share_BT, terms).log_softmax(-1)
    if not shape.cutoffs:
        return head
    first = shape.cutoffs[0]
    parts = [head[..., :first]]
    for k in range(1, len(shape.clusters())):
        names = (f"projection.tail{k}", f"embedding.tail{k}", f"softmax.tail{k}.bias")
        projection, table, bias = (weights[name] for name in names)
        rows = (output_BTE @ projection) @ table.mT
        inside = (rows + (bias if bias.dim() == 1 else bias.unsqueeze(1))).log_softmax(-1)
        parts.append(inside + head[..., first + k - 1 : first + k])
    return torch.cat(parts, -1)


class RecurrentState(NamedTuple):
    """Hidden state of the recurrent layers: tuples of tensors (B, size)."""

    h: tuple[Tensor, ...]
    """Outputs of every LSTM layer, L of (B, H_l); none of a QRNN, which does not read them."""
    c: tuple[Tensor, ...]
    """Cells of every layer, L of (B, H_l)."""
    x: tuple[Tensor, ...] = ()
    """Last input (B, E) of a QRNN's first layer, whose window holds it beside the next one."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> RecurrentState:
        return RecurrentState(*(tuple(change(t) for t in part) for part in self))

    def keep(self, keep_B: Tensor) -> RecurrentState:
        """Zero the lanes where `keep_B` (B,) is False: a new article starts there."""
        return self._each(lambda t: t.masked_fill(~keep_B.unsqueeze(1), 0))

    def select(self, lanes: Tensor) -> RecurrentState:
        """The state of some lanes (their indices)."""
        return self._each(lambda t: t[lanes])

    def detach(self) -> RecurrentState:
        """The same state without its autograd history."""
        return self._each(lambda t: t.detach())

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, for files."""
        return [*self.h, *self.c, *self.x]

    def of(self, tensors: Sequence[Tensor]) -> RecurrentState:
        """The state made of such `tensors`."""
        rest = iter(tensors)
        return self._each(lambda _: next(rest))


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
    """DropConnect on the recurrent weights ("weight drop"), which only an LSTM has."""
    lanes: tuple[int, int] | None = None
    """(first, all): the lanes are those from `first` on among so many, for all of which masks are
    drawn; None = they are all."""


def initial_weights(shape: BaseModel, generator: torch.Generator) -> Weights:
    """Fresh weights (`BaseModel.initial_weights`)."""
    return shape.initial_weights(generator)


def initial_state(
    shape: RecurrentLM,
    lanes: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RecurrentState:
    """A zero state for `lanes` articles about to begin."""
    return shape.initial_state(lanes, device, dtype)


def _lookup(table: Tensor, ids_BT: Tensor) -> Tensor:
    """Rows of a shared (V, E) or per-lane (B, V, E) table -> (B, T, E)."""
    if table.dim() == 2:
        return F.embedding(ids_BT, table)
    lanes, size, width = table.shape
    offset = torch.arange(lanes, device=ids_BT.device).unsqueeze(1) * size
    return F.embedding(ids_BT + offset, table.reshape(lanes * size, width))


def embed(weights: Weights, shape: BaseModel, tokens_BT: Tensor) -> Tensor:
    """Input embedding (B, T, E); tails are narrow tables projected up (Baevski & Auli 2019)."""
    if not shape.cutoffs:
        return _lookup(weights["embedding"], tokens_BT)
    first = shape.cutoffs[0]
    out = _lookup(weights["embedding"], tokens_BT.clamp(max=first - 1))
    for k, (lo, hi, _) in enumerate(shape.clusters()[1:], start=1):
        inside = (tokens_BT >= lo) & (tokens_BT < hi)
        rows = _lookup(weights[f"embedding.tail{k}"], (tokens_BT - lo).clamp(0, hi - lo - 1))
        out = torch.where(inside.unsqueeze(-1), linear(rows, weights[f"projection.tail{k}"]), out)
    return out


def locked(
    x_BTE: Tensor,
    rate: float,
    generator: torch.Generator | None,
    lanes: tuple[int, int] | None = None,
) -> Tensor:
    """Locked (variational) dropout: one mask per lane, the same at every step.

    `lanes` is as in `Dropout`.
    """
    if not rate:
        return x_BTE
    first, number = lanes or (0, len(x_BTE))
    keep = torch.rand(number, 1, x_BTE.shape[2], generator=generator, device=x_BTE.device).ge(rate)
    keep = keep[first : first + len(x_BTE)]
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
    change: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer: the library's fused kernel where all weights are shared, else the engine.

    `extra_BTG` and `change` as in `lane_lstm`.
    """
    w_input, w_recurrent, bias = weights
    shared = w_input.dim() == w_recurrent.dim() == 2 and bias.dim() == 1
    if shared and extra_BTG is None and change is None and not is_plain():
        flat = [w_input, w_recurrent, bias, torch.zeros_like(bias)]
        state = (h.unsqueeze(0), c.unsqueeze(0))
        grad = torch.is_grad_enabled()
        y, h_n, c_n = torch.lstm(x, state, flat, True, 1, 0.0, grad, False, True)
        return y, h_n.squeeze(0), c_n.squeeze(0)
    return lane_lstm(x, weights, h, c, extra_BTG, change)


def _input(weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, input matrix, what is added to their product) of a layer.

    A low-rank change per lane is cheaper as a term of its own, and one that holds the whole matrix
    as that matrix; a shared one is folded in, so that static reading keeps the fused kernel.
    """
    low = weights.get(f"{name}.low")
    if low is None or low.dim() == 2:
        return x, dense(weights, name), None
    if is_folded(weights, name):
        return linear(x, weights[f"{name}.basis"]), low, None
    return x, weights[name], low_rank_product(weights, name, x)


def _recurrent_weight(weights: Weights, name: str) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(recurrent matrix, its low-rank change per lane, if any); a shared one is folded in."""
    low = weights.get(f"{name}.low")
    if low is not None and low.dim() == 3:
        return weights[name], (low, weights[f"{name}.directions"])
    return dense(weights, name), None


def dropped_input(
    weights: Weights,
    shape: BaseModel,
    tokens_BT: Tensor,
    drop: Dropout,
    generator: torch.Generator | None,
) -> Tensor:
    """Input embedding (B, T, E) after embedding and input dropout."""
    if drop.embedding:
        weights = dict(weights)
        for name in [n for n in weights if n.startswith("embedding")]:
            weights[name] = _drop_words(weights[name], drop.embedding, generator)
    return locked(embed(weights, shape, tokens_BT), drop.input, generator, drop.lanes)


def _lstm_layer(
    weights: Weights,
    layer: int,
    x: Tensor,
    state: RecurrentState,
    weight_drop: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, RecurrentState]:
    """Outputs (B, T, H) of an LSTM layer and its part of the state."""
    recurrent, change = _recurrent_weight(weights, f"lstm.{layer}.recurrent")
    if weight_drop:
        keep = torch.rand(recurrent.shape, generator=generator, device=recurrent.device)
        recurrent = recurrent * (keep.ge(weight_drop).to(recurrent.dtype) / (1 - weight_drop))
    x, w_input, extra = _input(weights, f"lstm.{layer}.input", x)
    own = (w_input, recurrent, weights[f"lstm.{layer}.bias"])
    y, h, c = _layer(x, own, state.h[layer], state.c[layer], extra, change)
    exact = state.c[layer].dtype  # not the half precision of an autocast
    return y, RecurrentState((h.to(exact),), (c.to(exact),))


def _qrnn_layer(
    weights: Weights, layer: int, x: Tensor, state: RecurrentState
) -> tuple[Tensor, RecurrentState]:
    """Outputs (B, T, H) of a QRNN layer and its part of the state."""
    before = state.x[layer] if layer < len(state.x) else None
    own = weights[f"qrnn.{layer}.input"], weights[f"qrnn.{layer}.bias"]
    y, c = lane_qrnn(x, own, state.c[layer], before)
    return y, RecurrentState((), (c,), () if before is None else (x[:, -1],))


def run_lstm(
    weights: Weights,
    shape: RecurrentLM,
    tokens_BT: Tensor,
    state: RecurrentState,
    dropout: Dropout | None = None,
    generator: torch.Generator | None = None,
) -> Hidden[RecurrentState]:
    """Read `tokens_BT` (B, T) from `state` through recurrent layers of either cell.

    Every weight is shared or has a leading B.
    `dropout` is for training with shared weights only; `generator` makes it repeatable.
    """
    drop = dropout or Dropout()
    x = dropped_input(weights, shape, tokens_BT, drop, generator)
    raws: list[Tensor] = []
    ends: list[RecurrentState] = []
    for layer in range(shape.layers):
        if shape.cell == "qrnn":
            raw, end = _qrnn_layer(weights, layer, x, state)
        else:
            raw, end = _lstm_layer(weights, layer, x, state, drop.weight, generator)
        raws.append(raw)
        ends.append(end)
        last = layer == shape.layers - 1
        x = locked(raw, drop.output if last else drop.hidden, generator, drop.lanes)
    after = state.of([t for part in zip(*ends, strict=True) for ts in part for t in ts])
    return Hidden(x, raws[-1], after, tuple(raws))


def score(
    weights: Weights,
    shape: RecurrentLM,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    state: RecurrentState,
) -> tuple[Tensor, RecurrentState]:
    """Loss of every token, (B, T) in nats, and the state after the segment."""
    hidden = run_lstm(weights, shape, tokens_BT, state)
    return token_nll(weights, shape, hidden.output, targets_BT), hidden.state
