"""Small networks shared by all weights, as parts of learned rules (coordinate sharing).

What a network says of a weight is added to the logarithms of its gates. The output layer starts at
zero, so a rule starts exactly at what it is without the network; the layers before it start small
and random, from a fixed seed. There are no biases: one of the inputs is always one.
Letters: B lanes, N weights, F inputs (a gate's columns), H hidden units, O outputs (UPDATE, and
FLUSH).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlm.models.language_model import Weights

BLOCK = 2048
"""Weights a network looks at together."""


SPREAD = 0.1
"""Standard deviation of the hidden layers' weights at the start."""


@dataclass(frozen=True)
class Network(ABC):
    """What the networks have in common; parameters are named `<kind>.<layer>`."""

    hidden: int
    kind: ClassVar[str]
    rows: ClassVar[dict[str, int]]
    """Rows per hidden unit of the layers before the output: `input` (rows H, F), and if there is
    one `recurrent` (rows H, H)."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """What the network remembers of every weight, H numbers each."""

    def initial(self, inputs: int, outputs: int, like: Tensor) -> Weights:
        """Parameters of a network that says nothing yet, in the dtype and place of `like`."""
        generator = torch.Generator().manual_seed(0)
        columns = {"input": inputs, "recurrent": self.hidden}
        parameters = {
            f"{self.kind}.{layer}": SPREAD
            * torch.randn(rows * self.hidden, columns[layer], generator=generator).to(like)
            for layer, rows in self.rows.items()
        }
        return parameters | {f"{self.kind}.output": like.new_zeros(outputs, self.hidden)}

    def take_over(self, parameters: Weights, smaller: Weights, columns: Sequence[int]) -> None:
        """Make `parameters` (from `initial`) say what a network with no more units says, in place.

        Args:
            smaller: parameters of the other network; outputs that are here no more are dropped.
            columns: where the other's inputs are among those of this one.
        """
        output, said = parameters[f"{self.kind}.output"], smaller[f"{self.kind}.output"]
        outputs, units = min(len(output), len(said)), said.shape[1]
        output[:outputs, :units] = said[:outputs]
        for layer, rows in self.rows.items():
            name = f"{self.kind}.{layer}"
            mine = parameters[name].view(rows, self.hidden, -1)
            mine[:, :units] = 0
            at = list(columns) if layer == "input" else list(range(units))
            mine[:, :units, at] = smaller[name].view(rows, units, -1)

    def state(self, like: Tensor) -> Weights:
        """What the network remembers of a tensor at the start: zeros (H, ...)."""
        return {n: like.new_zeros(self.hidden, *like.shape) for n in self.remembers}

    def say(self, parameters: Weights, x: Tensor, state: Weights) -> tuple[Tensor, Weights]:
        """(what it says (B, O, ...), the state after it) from inputs x (B, F, ...).

        Some weights at a time, so that what lies between stays in the cache.
        """
        flat = [t.flatten(2).split(BLOCK, 2) for t in (x, *state.values())]
        said, after = [], []
        for some, *before in zip(*flat, strict=True):
            own, *new = self.cell(parameters, some, *before)
            said.append(own)
            after.append(new)
        whole = [
            torch.cat(p, 2).unflatten(2, x.shape[2:]) for p in (said, *zip(*after, strict=True))
        ]
        return whole[0], dict(zip(state, whole[1:], strict=True))

    @abstractmethod
    def cell(self, parameters: Weights, x_BFN: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(what it says (B, O, N), *the state after it) of N weights; state as in `remembers`."""


@dataclass(frozen=True)
class MLP(Network):
    """One tanh layer (learned optimisers of Metz et al. 2019)."""

    kind: ClassVar[str] = "mlp"
    rows: ClassVar[dict[str, int]] = {"input": 1}

    def cell(self, parameters: Weights, x_BFN: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """V tanh(W x)."""
        return (parameters["mlp.output"] @ (parameters["mlp.input"] @ x_BFN).tanh(),)


@dataclass(frozen=True)
class LSTM(Network):
    """An LSTM with a hidden state for every weight (Andrychowicz et al. 2016)."""

    kind: ClassVar[str] = "lstm"
    rows: ClassVar[dict[str, int]] = {"input": 4, "recurrent": 4}
    remembers: ClassVar[tuple[str, ...]] = ("h", "c")

    def cell(self, parameters: Weights, x_BFN: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """V h; gates in the order input, forget, cell, output."""
        h, c = state
        gates = parameters["lstm.input"] @ x_BFN + parameters["lstm.recurrent"] @ h
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return parameters["lstm.output"] @ h, h, c
