"""Long-term memory: the static weights theta_0 every article starts from, and their Fisher.

Letters: B lanes, M tokens per segment, N weights of one tensor.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.kernels import buffers
from mlm.models.extension import Extension
from mlm.models.language_model import LanguageModel, Weights
from mlm.models.low_rank import BASIS, DIRECTIONS, LOW, fold_weights

DYNAMIC_SETS = {
    "all": ("*",),
    "lstm": ("lstm.*", "qrnn.*"),
    "output": ("embedding*", "softmax.*", "projection.*"),
    "bias": ("*bias",),
    "low": ("*.low",),
}


@dataclass(frozen=True)
class AdaptationBase:
    """What the corpus left behind, never written while reading: the long-term memory.

    `weights` is theta_0 (all tensors, shared by the lanes), with the extensions' own weights
    beside the model's; `dynamic` names those that each lane rewrites; `rms` is the root of the
    diagonal empirical Fisher (mean square of per-segment gradients, Krause et al. 2018, eq. 5) of
    the dynamic tensors; `loss` the mean loss in nats per token of the text it was estimated on.
    """

    model: LanguageModel
    weights: Weights
    dynamic: tuple[str, ...]
    rms: Weights
    loss: float
    segment: int
    limit: float = math.inf
    """Nats per token by which a lane may lose more than theta_0 over a segment (the guard)."""
    guess: float = 0.0
    """Nats per token that guessing loses; the guard looks at lanes that lose more."""
    extensions: tuple[Extension, ...] = ()
    """What lanes read with besides, in the order in which it is asked."""

    @cached_property
    def mean_rms(self) -> float:
        """Mean of `rms` over all dynamic weights (the normaliser of Krause's decay)."""
        total = sum(float(r.double().sum()) for r in self.rms.values())
        return total / sum(r.numel() for r in self.rms.values())

    @cached_property
    def static(self) -> Weights:
        """theta_0 without low-rank changes, which change nothing there."""
        return {n: w for n, w in self.weights.items() if _of_stage_1(n)}

    def start(self) -> Weights:
        """theta_0 of the dynamic tensors."""
        return {name: self.weights[name] for name in self.dynamic}

    @property
    def reweights(self) -> bool:
        """Whether rules follow another gradient than that of the loss."""
        return any(extension.reweights for extension in self.extensions)

    def with_weights(self, weights: Weights) -> AdaptationBase:
        """The same base with some weights in place of, or beside, its own."""
        return dataclasses.replace(self, weights={**self.weights, **weights})

    def guarded(self, guard: float, vocabulary_size: int) -> AdaptationBase:
        """The same base with the guard of `--adapt.guard`; 0 = none."""
        return dataclasses.replace(self, limit=guard or math.inf, guess=math.log(vocabulary_size))

    def keeping(self, wanted: Callable[[Extension], bool]) -> AdaptationBase:
        """The same base with some of its extensions."""
        return dataclasses.replace(self, extensions=tuple(filter(wanted, self.extensions)))

    def of_model(self) -> AdaptationBase:
        """As static reading sees it: with what belongs to the language model."""
        return self.keeping(lambda extension: extension.of_model)

    def for_rule(self, rule: object) -> AdaptationBase:
        """As lanes that an update rule writes see it."""
        return self.keeping(lambda extension: extension.applies_to(rule))

    def for_protocol(self, protocol: str) -> AdaptationBase:
        """As it is read with in a protocol."""
        return self.keeping(lambda extension: extension.applies_in(protocol))

    def derived(self) -> AdaptationBase:
        """With the extensions' weights that follow from others."""
        found: Weights = {}
        for extension in self.extensions:
            found |= extension.derived(self)
        return self.with_weights(found) if found else self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AdaptationBase:
        """The same base on `device`, optionally in another dtype."""
        weights = {
            n: w.to(device, dtype if w.is_floating_point() else None)
            for n, w in self.weights.items()
        }
        rms = {n: w.to(device, dtype) for n, w in self.rms.items()}
        return dataclasses.replace(self, weights=weights, rms=rms)


def _of_stage_1(name: str) -> bool:
    """Whether this is a weight of a language model as stage 1 trains it."""
    return "/" not in name and not name.endswith((LOW, DIRECTIONS, BASIS))


def _patterns(wanted: str) -> dict[str, tuple[str, ...]]:
    """The patterns each word of `wanted` stands for."""
    words = [w.strip() for w in wanted.split(",") if w.strip()]
    return {word: DYNAMIC_SETS.get(word, (word,)) for word in words}


def has_low_rank(wanted: str) -> bool:
    """Whether these sets and patterns ask for a low-rank change."""
    return any(p.endswith(LOW) for patterns in _patterns(wanted).values() for p in patterns)


def choose_dynamic(weights: Iterable[str], wanted: str) -> tuple[str, ...]:
    """Names of the weights that adapt.

    Low-rank changes, which a model has only once they are asked for, are matched by patterns that
    end in `.low`, and by no others. An LSTM's matrices and the softmax over recurrent layers may
    have them.

    Args:
        weights: names of a language model's weights, with or without low-rank changes.
        wanted: comma-separated sets (all, lstm, output, bias, low) or name patterns such as
            `lstm.*.recurrent`, `softmax.bias` or `softmax.low`. `lstm` is the recurrent layers,
            a QRNN's too.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name in weights if _of_stage_1(name)]
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
        out[name] = buffers.acquire(tuple(w.shape), w).copy_(w)
        out[name][new_B] = start[name]
    return out


def fold_low_rank(base: AdaptationBase) -> AdaptationBase:
    """The same long-term memory; changes of full rank hold the matrix they change.

    Gates, gradients and losses are the same, to rounding. Not for recurrent matrices, whose change
    is a term in the time loop, nor for what adapts without a change, too, nor for the head of an
    adaptive softmax, which has other rows.
    """
    return dataclasses.replace(base, weights=fold_weights(base.weights, base.dynamic))


def unfold_low_rank(base: AdaptationBase) -> AdaptationBase:
    """`fold_low_rank` undone: theta_0's changes are zero again."""
    weights = dict(base.weights)
    for name in [n.removesuffix(BASIS) for n in weights if n.endswith(BASIS)]:
        weights[name + LOW] = torch.zeros_like(weights[name + LOW])
        weights[name + DIRECTIONS] = weights.pop(name + BASIS)
    return dataclasses.replace(base, weights=weights)
