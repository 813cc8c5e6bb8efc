"""What a language model is: a function of explicit weights, with a state for every lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

Weights = dict[str, Tensor]


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


class Read(NamedTuple):
    """A segment read by a language model."""

    nll: Tensor
    """(B, T) nats; differentiable only within `plain_operations` (mlm.models.recurrence)."""
    total: Tensor
    """Differentiable sum of nll times the shares that were asked for; zero without any."""
    output: Tensor
    """(B, T, E): what the softmax sees."""
    state: State
    """Short-term memory after the segment."""


Recall = Callable[[Tensor], Weights]
"""From the hidden states of a segment (B, T, E), which are not written, to weights for its softmax
layer, such as what phrases say (`mlm.extensions.phrases`)."""


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
        recall: Recall | None = None,
    ) -> Read:
        """Predict a segment.

        Args:
            weights: each is shared by the lanes or has a leading B.
            tokens_BT, targets_BT: what is read, and the next tokens, to be predicted.
            state: `initial_state`, or what the segment before left (`Read.state`).
            share_BT: of every token's loss in `Read.total`; None = no total is needed.
            recall: given the hidden states, what its softmax layer is told besides; never given to
                models without `run` (`mlm.reading.step.begin` refuses to remember phrases for them).
        """
        ...
