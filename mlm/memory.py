"""Long-term memory: the static weights theta_0 every article starts from, and their Fisher.

Letters: B lanes, M tokens per segment, N weights of one tensor.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm.errors import UserError
from mlm.lm import LMShape, Weights

DYNAMIC_SETS = {
    "all": ("*",),
    "lstm": ("lstm.*",),
    "output": ("embedding*", "softmax.*", "projection.*"),
    "bias": ("*bias",),
}


@dataclass(frozen=True)
class LongTerm:
    """What the corpus left behind, never written while reading.

    `weights` is theta_0 (all tensors, shared by the lanes); `dynamic` names those that each lane
    rewrites; `rms` is the root of the diagonal empirical Fisher (mean square of per-segment
    gradients, Krause et al. 2018, eq. 5) of the dynamic tensors; `loss` the mean loss in nats per
    token of the text it was estimated on.
    """

    shape: LMShape
    weights: Weights
    dynamic: tuple[str, ...]
    rms: Weights
    loss: float
    segment: int

    @property
    def mean_rms(self) -> float:
        """Mean of `rms` over all dynamic weights (the normaliser of Krause's decay)."""
        total = sum(float(r.double().sum()) for r in self.rms.values())
        return total / sum(r.numel() for r in self.rms.values())

    def start(self) -> Weights:
        """theta_0 of the dynamic tensors."""
        return {name: self.weights[name] for name in self.dynamic}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LongTerm:
        """The same memory on `device`, optionally in another dtype."""
        weights = {n: w.to(device, dtype) for n, w in self.weights.items()}
        rms = {n: w.to(device, dtype) for n, w in self.rms.items()}
        return LongTerm(self.shape, weights, self.dynamic, rms, self.loss, self.segment)


def choose_dynamic(weights: Weights, wanted: str) -> tuple[str, ...]:
    """Names of the weights that adapt.

    Args:
        wanted: comma-separated sets (all, lstm, output, bias) or name patterns such as
            `lstm.*.recurrent` or `softmax.bias`.

    Raises:
        UserError: a pattern matches nothing.
    """
    chosen: list[str] = []
    for word in [w.strip() for w in wanted.split(",") if w.strip()]:
        found = [
            name
            for pattern in DYNAMIC_SETS.get(word, (word,))
            for name in weights
            if fnmatch.fnmatchcase(name, pattern)
        ]
        if not found:
            raise UserError(
                f"--adapt.dynamic: {word!r} matches no weight. Use {', '.join(DYNAMIC_SETS)} or a "
                f"pattern of these names: {', '.join(weights)}"
            )
        chosen += found
    if not chosen:
        raise UserError("--adapt.dynamic is empty. Name at least one set, for example lstm")
    return tuple(name for name in weights if name in chosen)


def lanes_of(weights: Weights, lanes: int) -> Weights:
    """A copy of each tensor for every lane: (B, ...)."""
    return {n: w.unsqueeze(0).expand(lanes, *w.shape).contiguous() for n, w in weights.items()}


def reset_lanes(weights: Weights, start: Weights, new_B: Tensor) -> Weights:
    """Weights in which the lanes flagged in `new_B` hold `start` again; inputs are not written."""
    if not bool(new_B.any()):
        return weights
    out = {}
    for name, w in weights.items():
        flag = new_B.view(-1, *[1] * (w.dim() - 1))
        out[name] = torch.where(flag, start[name], w)
    return out
