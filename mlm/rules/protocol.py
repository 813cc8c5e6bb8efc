"""Update rules behind one signature: what a segment's gradient does to a lane's weights.

    theta_t = f * theta_{t-1} + i * gradient_t + z * theta_0        (eq. 6, Wolf et al. 2018)

f = COPY, i = UPDATE, z = FLUSH, elementwise. A rule is settings only; its parameters are a plain
dict of tensors. `formula` is the rule as written in its paper, slow and differentiable; `bind`
fixes parameters and long-term memory and returns the fast form used while reading.
Letters: B lanes, N weights of a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.rules.forward import Tangent, dots_of_all, push_formula, zero_tangent

Parameters = dict[str, Tensor]


most_units = 4096
"""Of a network in a rule's gates; a file or a flag that asks for more is refused."""


class Signal(NamedTuple):
    """What a lane knows besides its gradient, each (B,)."""

    loss: Tensor
    """Mean loss of the segment just scored, nats per token."""
    age: Tensor
    """Updates since the lane's weights were last theta_0, this one not counted."""


class Bound(Protocol):
    """A rule with its parameters and long-term memory fixed.

    `weights` below are all that a lane holds: the dynamic tensors, and beside them what the rule
    itself remembers (momentum, moments, a hidden state), named `<tensor>/<what>`.
    """

    def start(self) -> Weights:
        """What a lane that opens an article holds: theta_0 and the rule's state there."""
        ...

    def update(
        self, weights: Weights, gradients: Weights, signal: Signal, out: Weights | None = None
    ) -> Weights:
        """theta_t from theta_{t-1} and the segment's gradient, all (B, ...).

        `out` (same structure) receives the result; the inputs are never written.
        """
        ...

    def pullback(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        cotangent: Weights,
        own: float = 0.0,
    ) -> tuple[Weights, Parameters]:
        """The transpose of `update`, with gradients and signals as constants (first order).

        Returns d<cotangent, theta_t>/d theta_{t-1} + own * gradients, the share of the segment's
        own loss, and d<cotangent, theta_t>/d parameters. `cotangent` may be overwritten.
        """
        ...

    def tangent(self, lanes: int) -> Tangent:
        """S = d theta/d parameters of lanes at theta_0: zeros, (K, B, ...) per tensor.

        Its K copies of the lanes' weights belong to the caller; what they are, the rule knows.
        """
        ...

    def advance(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        tangent: Tangent,
        found: Parameters,
    ) -> None:
        """One step of forward mode, beside `update` and with its arguments (first order).

            found <- found + <S_{t-1}, gradient_t>
            S_t = d theta_t/d theta_{t-1} S_{t-1} + d theta_t/d parameters

        `found` (one tensor per parameter) and `tangent` are written in place.
        """
        ...

    def owed(self, tangent: Tangent, cotangent: Weights, signal: Signal, found: Parameters) -> None:
        """found <- found + <S, cotangent>, in place; `advance` does so with the gradient."""
        ...


def as_parameters(setting: Mapping[str, float], base: AdaptationBase) -> Parameters:
    """Settings of a hand-made rule as the parameters it is bound with."""
    like = next(iter(base.rms.values()))
    return {name: like.new_tensor(value) for name, value in setting.items()}


def of_tensor(weights: Weights, name: str) -> Weights:
    """A dynamic tensor and what the rule remembers beside it."""
    return {n: w for n, w in weights.items() if n == name or n.startswith(f"{name}/")}


def per_lane(value: Tensor, weights_B: Tensor) -> Tensor:
    """A number, or one number per lane (B,), shaped to multiply weights (B, ...)."""
    return value if value.dim() == 0 else value.view(-1, *[1] * (weights_B.dim() - 1))


class UpdateRule(ABC):
    """The signature every rule shares."""

    name: str
    """Name in tables and files."""
    adapts: bool = True
    """False: weights never change and no gradient is needed."""

    @abstractmethod
    def formula(
        self,
        parameters: Parameters,
        base: AdaptationBase,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
    ) -> Weights:
        """theta_t as the rule's paper writes it; differentiable in all tensors.

        The result holds what `weights` hold, the rule's own state included.
        """

    def state(self, base: AdaptationBase) -> Weights:
        """What the rule remembers beside a lane's weights, at the start of an article."""
        return {}

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """The fast form; this default evaluates `formula`."""
        return ByFormula(self, parameters, base)


class FastGatesRule(UpdateRule):
    """What the fast forms ask of a rule with gates; `mlm.rules.gates` holds its equations."""

    flush: bool
    gain: bool
    momentum: bool
    square: bool
    per_weight: bool
    per_unit: bool
    eps: float
    features: Any
    """Names of the features, a tuple."""
    columns: Any
    """Column of every feature in a gate's row, a dict."""

    @abstractmethod
    def group(self, base: AdaptationBase, name: str) -> int:
        """Row of the parameters that serves this tensor."""

    @abstractmethod
    def lane_features(self, base: AdaptationBase, signal: Signal) -> dict[str, Tensor]:
        """Features that are one number per lane, (B,) each."""

    @abstractmethod
    def lane_part(self, row_F: Tensor, base: AdaptationBase, signal: Signal) -> Tensor | None:
        """Part of w . x that is one number per lane: (B,)."""

    @abstractmethod
    def fisher(self, base: AdaptationBase, name: str, gate: str) -> Tensor:
        """log(RMS / mean RMS), the tensor's shape."""

    @abstractmethod
    def weight_logs(
        self, parameters: Parameters, base: AdaptationBase, name: str, gate: str
    ) -> Tensor:
        """Logarithm of a gate's factor per weight: the tensor's shape."""

    @abstractmethod
    def moment_numbers(
        self, parameters: Parameters, base: AdaptationBase, name: str
    ) -> tuple[Tensor | None, Tensor | None]:
        """(mu, a) of a tensor's moments, None = without."""


class ByFormula:
    """Any rule, slowly: `update` is its formula, `pullback` and `advance` differentiate it."""

    def __init__(self, rule: UpdateRule, parameters: Parameters, base: AdaptationBase) -> None:
        self.rule, self.parameters, self.base = rule, parameters, base
        self._start = {**base.start(), **rule.state(base)}

    def start(self) -> Weights:
        """See `Bound.start`."""
        return self._start

    def update(
        self, weights: Weights, gradients: Weights, signal: Signal, out: Weights | None = None
    ) -> Weights:
        """See `Bound.update`."""
        new = self.rule.formula(self.parameters, self.base, weights, gradients, signal)
        if out is None:
            return new
        return {name: out[name].copy_(value) for name, value in new.items()}

    def pullback(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        cotangent: Weights,
        own: float = 0.0,
    ) -> tuple[Weights, Parameters]:
        """See `Bound.pullback`."""
        with torch.enable_grad():
            phi = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
            theta = {n: w.detach().requires_grad_() for n, w in weights.items()}
            new = self.rule.formula(phi, self.base, theta, gradients, signal)
            inputs = [*theta.values(), *phi.values()]
            found = torch.autograd.grad(
                [new[n] for n in theta], inputs, [cotangent[n] for n in theta], allow_unused=True
            )
        full = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
        n = len(theta)
        back = dict(zip(theta, full[:n], strict=True))
        back |= {k: back[k] + own * gradients[k] for k in gradients}
        return back, dict(zip(phi, full[n:], strict=True))

    def tangent(self, lanes: int) -> Tangent:
        """See `Bound.tangent`: one copy per number in the parameters."""
        numbers = sum(p.numel() for p in self.parameters.values())
        return zero_tangent(self._start, numbers, lanes)

    def advance(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        tangent: Tangent,
        found: Parameters,
    ) -> None:
        """See `Bound.advance`; costs an evaluation of the formula per number in the parameters."""
        self.owed(tangent, gradients, signal, found)

        def formula(phi: Parameters, theta: Weights) -> Weights:
            return self.rule.formula(phi, self.base, theta, gradients, signal)

        push_formula(formula, self.parameters, weights, tangent)

    def owed(self, tangent: Tangent, cotangent: Weights, signal: Signal, found: Parameters) -> None:
        """See `Bound.owed`."""
        sizes = [p.numel() for p in self.parameters.values()]
        sums = dots_of_all(tangent, cotangent).split(sizes)
        for part, value in zip(sums, found.values(), strict=True):
            value += part.view_as(value)


class LaneByLane(ByFormula):
    """`ByFormula`, one tensor of one lane at a time: what a formula needs in between stays small.

    For formulas in which weights know nothing of each other, and parameters are not per lane.
    """

    def _pieces(
        self, weights: Weights, gradients: Weights, signal: Signal
    ) -> Iterator[tuple[slice, Weights, Weights, Signal]]:
        """(lane, a tensor with its state, its gradient, signal), (1, ...) each."""
        for name, gradient in gradients.items():
            own = of_tensor(weights, name)
            for k in range(len(gradient)):
                lane = slice(k, k + 1)
                some = {n: w[lane] for n, w in own.items()}
                yield lane, some, {name: gradient[lane]}, Signal(*(x[lane] for x in signal))

    def update(
        self, weights: Weights, gradients: Weights, signal: Signal, out: Weights | None = None
    ) -> Weights:
        """See `Bound.update`."""
        out = out or {n: torch.empty_like(w) for n, w in weights.items()}
        for lane, some, gradient, felt in self._pieces(weights, gradients, signal):
            for n, value in super().update(some, gradient, felt).items():
                out[n][lane] = value
        return out

    def pullback(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        cotangent: Weights,
        own: float = 0.0,
    ) -> tuple[Weights, Parameters]:
        """See `Bound.pullback`."""
        found = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        for lane, some, gradient, felt in self._pieces(weights, gradients, signal):
            lam = {n: cotangent[n][lane] for n in some}
            back, part = super().pullback(some, gradient, felt, lam, own)
            for n, value in back.items():
                cotangent[n][lane] = value
            for n, value in part.items():
                found[n] += value
        return cotangent, found


@dataclass(frozen=True)
class Static(UpdateRule):
    """Weights never change: the ordinary language model."""

    name: str = "static"
    adapts: bool = False

    def formula(self, parameters, base, weights, gradients, signal):
        """theta_t = theta_{t-1}."""
        return weights


class LoadedRule(NamedTuple):
    """A rule with its parameters, and the long-term memory it starts from."""

    rule: UpdateRule
    parameters: Parameters
    base: AdaptationBase

    def bound(self) -> Bound:
        """Ready to read."""
        return self.rule.bind(self.parameters, self.base)
