"""A language model whose memory is its context, after SNAIL (Mishra et al. 2018, arXiv 1707.03141).

The rival of a memory in the weights: it keeps the last C tokens and reads them again, through
dilated causal convolutions and causal attention, with every segment. Blocks stand between the tied
embedding and softmax of the other base models. Every weight is shared or has a leading B.
Letters: B lanes, C context, T tokens of a segment, S = C + T positions, W channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.models.language_model import Weights
from mlm.models.recurrence import lane_linear
from mlm.models.recurrent import (
    BaseModel,
    Dropout,
    Hidden,
    Layout,
    RecurrentLM,
    dropped_input,
    locked,
)


class SnailState(NamedTuple):
    """The last tokens of every lane."""

    tokens: Tensor
    """(B, C) ids, the newest last."""
    filled: Tensor
    """(B,) how many of them, from the newest back, belong to the article."""

    def keep(self, keep_B: Tensor) -> SnailState:
        """Forget the tokens of the lanes where `keep_B` (B,) is False."""
        return SnailState(self.tokens, self.filled * keep_B)

    def select(self, lanes: Tensor) -> SnailState:
        """The state of some lanes (their indices)."""
        return SnailState(self.tokens[lanes], self.filled[lanes])

    def detach(self) -> SnailState:
        """Token ids have no autograd history."""
        return self

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, for files."""
        return [self.tokens, self.filled]

    def of(self, tensors: Sequence[Tensor]) -> SnailState:
        """The state made of such `tensors`."""
        return SnailState(*tensors)


@dataclass(frozen=True)
class SnailShape(BaseModel):
    """Sizes of the model: `layers` blocks, each from E channels to E.

    A block is Mishra et al.'s TC block, attention block and a linear map. Convolution k looks at
    two tokens 2^k apart and adds `filters` channels, tanh(a) sigmoid(g), to those it reads (dense
    connections), until the block reaches C tokens back. Attention, with one head of four times as
    many channels, looks at the last C positions, its own included, and adds what it reads.
    """

    vocabulary: int
    embedding: int
    filters: int
    layers: int
    context: int
    """C."""
    cutoffs: tuple[int, ...] = ()
    cell: Literal["snail"] = "snail"

    @property
    def dilations(self) -> list[int]:
        """Distance of the two tokens under each convolution of a block: 1, 2, 4, ..."""
        return [2**k for k in range(max(1, math.ceil(math.log2(self.context))))]

    def layer_layout(self) -> Layout:
        """Convolutions, attention (query, key, value) and output of every block."""
        found: Layout = {}
        head = 4 * self.filters
        for layer in range(self.layers):
            width = self.embedding
            parts: dict[str, tuple[int, int]] = {}
            for k in range(len(self.dilations)):
                parts[f"conv{k}"] = (2 * self.filters, 2 * width)
                width += self.filters
            parts["attention"] = (3 * head, width)
            parts["output"] = (self.embedding, width + head)
            for part, (outputs, inputs) in parts.items():
                found[f"snail.{layer}.{part}.input"] = (outputs, inputs), 1 / math.sqrt(inputs)
                found[f"snail.{layer}.{part}.bias"] = (outputs,), 0.0
        return found

    def initial_state(
        self, lanes: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SnailState:
        """No token yet."""
        tokens = torch.zeros(lanes, self.context, dtype=torch.int64, device=device)
        return SnailState(tokens, torch.zeros_like(tokens[:, 0]))

    def run(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        state: SnailState,
        dropout: Dropout | None = None,
        generator: torch.Generator | None = None,
    ) -> Hidden[SnailState]:
        """See `BaseModel.run`; `Dropout.weight` does not apply.

        Positions before an article are zero everywhere, as if there were none.
        """
        drop = dropout or Dropout()
        tokens_BS = torch.cat([state.tokens, tokens_BT], 1)
        known_BS1, seen_BSS = self._visible(state.filled, tokens_BS.shape[1])
        x = dropped_input(weights, self, tokens_BS, drop, generator) * known_BS1
        steps, outputs = tokens_BT.shape[1], []
        for layer in range(self.layers):
            last = layer == self.layers - 1
            wanted = steps if last else tokens_BS.shape[1]
            raw = self._block(weights, layer, x, known_BS1, seen_BSS[:, -wanted:])
            outputs.append(raw[:, -steps:])
            rate = drop.output if last else drop.hidden
            x = locked(raw * known_BS1[:, -wanted:], rate, generator, drop.lanes)
        filled = (state.filled + steps).clamp(max=self.context)
        after = SnailState(tokens_BS[:, -self.context :], filled)
        return Hidden(x, outputs[-1], after, tuple(outputs))

    def _visible(self, filled_B: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """(B, S, 1): a position holds a token; (B, S, S): a query (row) may look at a key.

        A query sees its own position even where nothing is: its softmax then is a number.
        """
        at_S = torch.arange(positions, device=filled_B.device)
        known_BS = at_S >= (self.context - filled_B).unsqueeze(1)
        back_SS = at_S.unsqueeze(1) - at_S
        within_SS = (back_SS >= 0) & (back_SS < self.context)
        return known_BS.unsqueeze(2), within_SS & known_BS.unsqueeze(1) | (back_SS == 0)

    def _block(
        self, weights: Weights, layer: int, x_BSE: Tensor, known_BS1: Tensor, seen_BQS: Tensor
    ) -> Tensor:
        """Outputs (B, Q, E) of a block at the last Q positions."""

        def linear(part: str, x: Tensor) -> Tensor:
            name = f"snail.{layer}.{part}"
            return lane_linear(x, weights[f"{name}.input"], weights[f"{name}.bias"])

        x_BSW = x_BSE
        for k, dilation in enumerate(self.dilations):
            earlier = F.pad(x_BSW, (0, 0, dilation, 0))[:, : x_BSW.shape[1]]
            a, gate = linear(f"conv{k}", torch.cat([earlier, x_BSW], 2)).chunk(2, 2)
            x_BSW = torch.cat([x_BSW, a.tanh() * gate.sigmoid() * known_BS1], 2)
        query, key, value = linear("attention", x_BSW).chunk(3, 2)
        wanted = seen_BQS.shape[1]
        scores_BQS = query[:, -wanted:] @ key.mT / math.sqrt(key.shape[2])
        attention_BQS = scores_BQS.masked_fill(~seen_BQS, -math.inf).softmax(2)
        return linear("output", torch.cat([x_BSW[:, -wanted:], attention_BQS @ value], 2))


def snail_like(shape: RecurrentLM, context: int) -> SnailShape:
    """The model that has, as nearly as can be, as many weights as the recurrent one."""

    def with_filters(number: int) -> SnailShape:
        sizes = (shape.vocabulary, shape.embedding, number, shape.layers, context, shape.cutoffs)
        return SnailShape(*sizes)

    above = next(n for n in itertools.count(1) if with_filters(n).size >= shape.size)
    near = [with_filters(n) for n in (max(1, above - 1), above)]
    return min(near, key=lambda found: abs(found.size - shape.size))
