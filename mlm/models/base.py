"""Long-term memory: the static weights theta_0 every article starts from, and their Fisher.

Letters: B lanes, M tokens per segment, N weights of one tensor.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.extensions.boundaries import Borders
from mlm.extensions.ngrams import NAMES
from mlm.extensions.phrases import Phrases
from mlm.kernels import buffers
from mlm.models.language_model import LanguageModel, Weights
from mlm.models.low_rank import BASIS, DIRECTIONS, LOW, whole

DYNAMIC_SETS = {
    "all": ("*",),
    "lstm": ("lstm.*", "qrnn.*"),
    "output": ("embedding*", "softmax.*", "projection.*"),
    "bias": ("*bias",),
    "low": ("*.low",),
}


RELATED = "softmax.related"
"""What relates words to each other in the output layer (see `mlm.extensions.related`)."""


ROWS, COLUMNS = "softmax.once.rows", "softmax.once.columns"


TWICE = "softmax.once.twice"
"""How much of what a word teaches counts at the next one, and T^2 (see `mlm.extensions.at_once`)."""


SURPRISE, ONCE_SURPRISE = "softmax.surprise", "softmax.once.surprise"
"""How a token's loss counts for what it teaches after the segment and at once (`mlm.extensions.surprise`)."""


ONCE = (ROWS, COLUMNS, TWICE, SURPRISE, ONCE_SURPRISE)


CHANGES = (LOW, DIRECTIONS, BASIS, RELATED, *ONCE, *NAMES)
"""Endings of what is not a weight of stage 1."""


@dataclass(frozen=True)
class AdaptationBase:
    """What the corpus left behind, never written while reading.

    `weights` is theta_0 (all tensors, shared by the lanes); `dynamic` names those that each lane
    rewrites; `rms` is the root of the diagonal empirical Fisher (mean square of per-segment
    gradients, Krause et al. 2018, eq. 5) of the dynamic tensors; `loss` the mean loss in nats per
    token of the text it was estimated on.
    """

    shape: LanguageModel
    weights: Weights
    dynamic: tuple[str, ...]
    rms: Weights
    loss: float
    segment: int
    limit: float = math.inf
    """Mean loss of a segment, in nats per token, above which a lane is reset (the guard)."""
    borders: Borders | None = None
    """What tells a lane that it has begun to read another article; None = nothing does."""
    at_once: bool = False
    """Scores are those of an output layer that learns within a segment, too (`mlm.extensions.at_once`)."""
    surprise: float = 0.0
    """s of `mlm.extensions.surprise`: tokens teach the more, the larger their loss."""
    phrases: Phrases | None = None
    """How a lane remembers phrases (`mlm.extensions.phrases`); None = not at all."""

    @cached_property
    def mean_rms(self) -> float:
        """Mean of `rms` over all dynamic weights (the normaliser of Krause's decay)."""
        total = sum(float(r.double().sum()) for r in self.rms.values())
        return total / sum(r.numel() for r in self.rms.values())

    @cached_property
    def static(self) -> Weights:
        """theta_0 without low-rank changes, which change nothing there."""
        return {n: w for n, w in self.weights.items() if not n.endswith(CHANGES)}

    def start(self) -> Weights:
        """theta_0 of the dynamic tensors."""
        return {name: self.weights[name] for name in self.dynamic}

    def slope(self) -> Tensor | None:
        """(2,): 1 - s and s / L of `mlm.extensions.surprise`; None = s is 0."""
        if not self.surprise:
            return None
        some = self.weights[self.dynamic[0]]
        return some.new_tensor([1 - self.surprise, self.surprise / self.loss])

    def teaching(self, plain: bool = False) -> Weights:
        """What tells `LanguageModel.read` how tokens teach; `plain`: the gradient asked for is
        that of their losses all the same."""
        slope = self.slope()
        if slope is None:
            return {}
        return {ONCE_SURPRISE: slope} if plain else {ONCE_SURPRISE: slope, SURPRISE: slope}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AdaptationBase:
        """The same memory on `device`, optionally in another dtype."""
        weights = {
            n: w.to(device, dtype if w.is_floating_point() else None)
            for n, w in self.weights.items()
        }
        rms = {n: w.to(device, dtype) for n, w in self.rms.items()}
        borders = self.borders
        if borders is not None:
            borders = borders._replace(weights=borders.weights.to(device, dtype))
        phrases = self.phrases and self.phrases.to(device, dtype)
        return dataclasses.replace(self, weights=weights, rms=rms, borders=borders, phrases=phrases)


def _patterns(wanted: str) -> dict[str, tuple[str, ...]]:
    """The patterns each word of `wanted` stands for."""
    words = [w.strip() for w in wanted.split(",") if w.strip()]
    return {word: DYNAMIC_SETS.get(word, (word,)) for word in words}


def has_low_rank(wanted: str) -> bool:
    """Whether these sets and patterns ask for a low-rank change."""
    return any(p.endswith(LOW) for patterns in _patterns(wanted).values() for p in patterns)


def choose_dynamic(weights: Iterable[str], wanted: str) -> tuple[str, ...]:
    """Names of the weights that adapt.

    Low-rank changes, which a model has only once they are asked for (`mlm.training.directions`), are matched
    by patterns that end in `.low`, and by no others. An LSTM's matrices and the softmax over
    recurrent layers may have them.

    Args:
        weights: names of a language model's weights, with or without low-rank changes.
        wanted: comma-separated sets (all, lstm, output, bias, low) or name patterns such as
            `lstm.*.recurrent`, `softmax.bias` or `softmax.low`. `lstm` is the recurrent layers,
            a QRNN's too.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name in weights if not name.endswith(CHANGES)]
    matrices = [n for n in names if n.startswith("lstm.") and n.endswith((".input", ".recurrent"))]
    if {"lstm.0.bias", "qrnn.0.bias"} & set(names):
        names += [name + LOW for name in (*matrices, "softmax")]
    chosen: list[str] = []
    for word, patterns in _patterns(wanted).items():
        found = [
            name
            for pattern in patterns
            for name in names
            if name.endswith(LOW) == pattern.endswith(LOW) and fnmatch.fnmatchcase(name, pattern)
        ]
        if not found:
            raise UserError(
                f"--dynamic: {word!r} matches no weight. Use {', '.join(DYNAMIC_SETS)} or a "
                f"pattern of these names: {', '.join(names)}"
            )
        chosen += found
    if not chosen:
        raise UserError("--dynamic is empty. Name at least one set, for example lstm")
    return tuple(name for name in names if name in chosen)


def lanes_of(weights: Weights, lanes: int) -> Weights:
    """A copy of each tensor for every lane: (B, ...)."""
    # A clone: of one lane, `contiguous` would be theta_0 itself, which lanes write over.
    return {
        n: w.expand(lanes, *w.shape).clone(memory_format=torch.contiguous_format)
        for n, w in weights.items()
    }


def reset_lanes(weights: Weights, start: Weights, new_B: Tensor) -> Weights:
    """Weights in which the lanes flagged in `new_B` hold `start` again; inputs are not written."""
    if not bool(new_B.any()):
        return weights
    out = {}
    for name, w in weights.items():
        out[name] = buffers.take(tuple(w.shape), w).copy_(w)
        out[name][new_B] = start[name]
    return out


def turned(base: AdaptationBase) -> AdaptationBase:
    """The same long-term memory; changes of full rank hold the matrix they change.

    Gates, gradients and losses are the same, to rounding. Not for recurrent matrices, whose change
    is a term in the time loop, nor for what adapts without a change, too, nor for the head of an
    adaptive softmax, which has other rows.
    """
    return dataclasses.replace(base, weights=whole(base.weights, base.dynamic))


def plain(base: AdaptationBase) -> AdaptationBase:
    """`turned` undone: theta_0's changes are zero again."""
    weights = dict(base.weights)
    for name in [n.removesuffix(BASIS) for n in weights if n.endswith(BASIS)]:
        weights[name + LOW] = torch.zeros_like(weights[name + LOW])
        weights[name + DIRECTIONS] = weights.pop(name + BASIS)
    return dataclasses.replace(base, weights=weights)
