"""Two memories of an article in one weight: theta = theta_0 + fast + slow.

Letters: B lanes, N weights of a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlm import kernels
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.rules.fast_gates import FastGates
from mlm.rules.protocol import ByFormula, Parameters, Signal, UpdateRule

SLOW = "slow/"
"""Beginning of the names of the slow memory's parameters."""


def slow_name(name: str) -> str:
    """What the outside calls a weight or memory of the slow half: `softmax.bias/slow`."""
    tensor, _, what = name.partition("/")
    return f"{tensor}/slow/{what}" if what else f"{tensor}/slow"


def away(base: AdaptationBase) -> AdaptationBase:
    """The long-term memory that a slow one has: it starts from, and is flushed to, zero."""
    zeros = {n: torch.zeros_like(w) for n, w in base.start().items()}
    return dataclasses.replace(base, weights={**base.weights, **zeros})


def parts_of(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """Parameters (or their gradients) of the fast and of the slow memory's gates."""
    fast = {n: p for n, p in parameters.items() if not n.startswith(SLOW)}
    return fast, {n.removeprefix(SLOW): parameters[n] for n in parameters.keys() - fast.keys()}


def halves(weights: Weights) -> tuple[Weights, Weights]:
    """A lane's tensors in two: the slow memory's, by its own names, and the others."""
    near = {n: w for n, w in weights.items() if n.split("/")[1:2] != ["slow"]}
    return near, {n.replace("/slow", "", 1): weights[n] for n in weights if n not in near}


def split(weights: Weights, dynamic: Sequence[str]) -> tuple[Weights, Weights]:
    """What a lane holds as what its two memories hold: theta_0 + F and the like, and S."""
    near, far = halves(weights)
    return near | {n: near[n] - far[n] for n in dynamic if n in near}, far


def joined(near: Weights, far: Weights) -> Weights:
    """The other way round: theta = (theta_0 + F) + S, and what stands beside it."""
    both = {n: w + far[n] if n in far and "/" not in n else w for n, w in near.items()}
    return both | {slow_name(n): w for n, w in far.items()}


class TwoMemoryRule(UpdateRule):
    """A rule whose fast and slow memories have gates of their own."""

    flush: bool
    fast: Any
    """The gates of the fast memory, a rule."""
    slowly: Any
    """The gates of the slow memory, whose theta_0 is zero (`away`)."""


class TwoMemories(ByFormula):
    """A fast and a slow memory (`LinearGates.slow`), each in the fast form of its own gates."""

    rule: TwoMemoryRule

    def __init__(self, rule: TwoMemoryRule, parameters: Parameters, base: AdaptationBase) -> None:
        super().__init__(rule, parameters, base)
        own, others = parts_of(parameters)
        self._fast = rule.fast.bind(own, base)
        self._slow = rule.slowly.bind(others, away(base))
        both = [b for b in (self._fast, self._slow) if isinstance(b, FastGates)]
        self._both = [b for b in both if rule.flush and not b.has_moments]
        """The two, where one pass of `kernels.relax_both` does."""
        self._gates: Weights = {}
        """(4, N): UPDATE and FLUSH per weight of the one and of the other."""
        for name in base.dynamic if self._both else ():
            pairs = [t.reshape(-1) for b in self._both for t in b.factors(name)]
            self._gates[name] = torch.stack(pairs)

    def _push(
        self, name: str, weights: Weights, gradient: Tensor, signal: Signal, out: Weights
    ) -> None:
        """Both memories of one tensor in one pass of `kernels.relax_both`, into `out`."""
        lanes, far = len(gradient), slow_name(name)
        ones = torch.ones_like(gradient.view(lanes, -1)[:, 0])
        found = [b.lane_factors(name, signal) for b in self._both]
        factors = [ones if f is None else f for pair in found for f in pair]
        kernels.share_out(
            kernels.relax_both,
            kernels.tiles(gradient[0].numel()),
            gradient.numel(),
            *(t.contiguous().view(lanes, -1) for t in (weights[name], weights[far], gradient)),
            self.base.weights[name].contiguous().view(-1),
            self._gates[name],
            torch.stack(factors),
            *(out[n].view(lanes, -1) for n in (name, far)),
        )

    def update(
        self, weights: Weights, gradients: Weights, signal: Signal, out: Weights | None = None
    ) -> Weights:
        """See `Bound.update`."""
        out = out or {n: torch.empty_like(w) for n, w in weights.items()}
        if self._gates and kernels.usable(*weights.values(), *gradients.values(), *out.values()):
            for name, gradient in gradients.items():
                self._push(name, weights, gradient.contiguous(), signal, out)
            return out
        (near, far), (new_near, new_far) = halves(weights), halves(out)
        kept = {n: buffers.acquire(tuple(w.shape), w) for n, w in gradients.items()}
        for name in gradients:
            near[name] = torch.sub(near[name], far[name], out=kept[name])
        self._fast.update(near, gradients, signal, new_near)
        self._slow.update(far, gradients, signal, new_far)
        buffers.release(kept.values())
        for name in gradients:
            new_near[name].add_(new_far[name])
        return out

    def pullback(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        cotangent: Weights,
        own: float = 0.0,
    ) -> tuple[Weights, Parameters]:
        """See `Bound.pullback`; the memories' cotangents are those of F and S."""
        (near, far), (lam, lam_far) = halves(weights), halves(cotangent)
        kept = {n: buffers.acquire(tuple(w.shape), w) for n, w in gradients.items()}
        for name in gradients:
            near[name] = torch.sub(near[name], far[name], out=kept[name])
            lam_far[name] = lam_far[name].add_(lam[name])
        back, found = self._fast.pullback(near, gradients, signal, lam, own)
        back_far, more = self._slow.pullback(far, gradients, signal, lam_far, own)
        buffers.release(kept.values())
        for name in gradients:
            back_far[name].sub_(back[name])
        found |= {SLOW + n: p for n, p in more.items()}
        both = back | {slow_name(n): w for n, w in back_far.items()}
        return {n: both[n] for n in weights}, {n: found[n] for n in self.parameters}
