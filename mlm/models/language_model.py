"""What reading needs of any language model: its weights, its state, and one function that reads.

Letters: B lanes, T time, E width of what the softmax sees, I its inputs in a basis, V vocabulary,
S directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""Tensors by name. A name with a slash is not the model's own: `<extension>/<what>` belongs to an
extension, `<tensor>/<what>` to an update rule that remembers something beside a tensor."""


def own_weights(weights: Weights) -> Weights:
    """Those that are the language model's own."""
    return {name: w for name, w in weights.items() if "/" not in name}


class State(Protocol):
    """Short-term memory of B lanes: a value, never written in place."""

    def keep(self, keep_B: Tensor) -> Self:
        """The state in which lanes where `keep_B` (B,) is False begin a new article."""
        ...

    def select(self, lanes: Tensor) -> Self:
        """The state of some lanes (their indices)."""
        ...

    def detach(self) -> Self:
        """The same state without its autograd history."""
        ...

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, lanes first, for files."""
        ...

    def of(self, tensors: Sequence[Tensor]) -> Self:
        """The state made of such `tensors`."""
        ...


class WithinSegment(NamedTuple):
    """The dual form of a gradient step at every word of a segment (Sun et al. 2024, section 2.5).

    With e_s the gradient of the segment's loss by the logits at word s, and k_s the layer's inputs
    there, the logits at t lose a * sum_{s<t} e_s (k_s . (c * k_t) + d).
    """

    rows: Tensor
    """(V,): a."""
    columns: Tensor
    """(I + 1,): c, then d."""
    square: Tensor | None = None
    """(V, S): R of T^2 = I + R Q^T, where the layer is coupled by T = I + Q Q^T."""
    slope: Tensor | None = None
    """(2,): how a token's loss counts in e (`OutputTerms.slope`)."""


class OutputTerms(NamedTuple):
    """What the output layer is told besides the hidden state; every term may be absent."""

    added: Tensor | None = None
    """(B, T, E): added to the hidden state."""
    coupling: Tensor | None = None
    """(V, S), shared: Q of T = I + Q Q^T, which couples the rows of an output layer in a basis of
    its own: logits = T (L (P h)) + bias."""
    within: WithinSegment | None = None
    """What a segment's words teach the words behind them. It needs such a basis."""
    repeats: Tensor | None = None
    """(B, T, T): with `within`, how much of the error at word s < t the logits at t lose."""
    slope: Tensor | None = None
    """(2,), x and y: tokens weigh x + y * loss in the gradient of the total."""


def weighted_total(nll_BT: Tensor, share_BT: Tensor, slope: Tensor | None) -> Tensor:
    """Sum of share F(nll), F(l) = x l + y l^2 / 2; F(l) = l without a slope (x, y)."""
    if slope is None:
        return (nll_BT * share_BT).sum()
    return (nll_BT * share_BT * (slope[0] + slope[1] / 2 * nll_BT)).sum()


def gradient_share(nll_BT: Tensor, share_BT: Tensor, slope: Tensor | None) -> Tensor:
    """share F'(nll): what each token's gradient weighs in `weighted_total`."""
    return share_BT if slope is None else share_BT * (slope[0] + slope[1] * nll_BT)


Tell = Callable[[Tensor], OutputTerms]
"""From a segment's hidden states (B, T, E), not to be written, to terms for its output layer."""


class Read(NamedTuple):
    """A segment read by a language model."""

    nll: Tensor
    """(B, T) nats; differentiable only within `plain_operations` (mlm.models.recurrence)."""
    total: Tensor
    """Differentiable sum of nll times the shares that were asked for; zero without any."""
    output: Tensor
    """(B, T, E): the last layer's hidden states."""
    state: State
    """Short-term memory after the segment."""
    log_p: Tensor | None = None
    """(B, T, V): log-probabilities of every token, where they were asked for."""


class LanguageModel(Protocol):
    """A model of text as a function of its weights and of a state that it carries."""

    def initial_state(
        self, lanes: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state of `lanes` articles about to begin."""
        ...

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
        """Predict a segment.

        Args:
            weights: each is shared by the lanes or has a leading B.
            tokens_BT, targets_BT: what is read, and the next tokens, to be predicted.
            state: `initial_state`, or what the segment before left (`Read.state`).
            share_BT: of every token's loss in `Read.total`; None = no total is needed.
            tell: given the hidden states, the terms of the output layer; None = none.
            full: whether `Read.log_p` is wanted.
        """
        ...
