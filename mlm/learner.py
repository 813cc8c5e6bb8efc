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
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from mlm import kernels
from mlm.filters import Filter, root
from mlm.forward import Tangent, dots_of_all, push_formula, zero_tangent
from mlm.lm import Weights
from mlm.memory import LongTerm

Parameters = dict[str, Tensor]


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


def as_parameters(setting: Mapping[str, float], memory: LongTerm) -> Parameters:
    """Settings of a hand-made rule as the parameters it is bound with."""
    like = next(iter(memory.rms.values()))
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
        memory: LongTerm,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
    ) -> Weights:
        """theta_t as the rule's paper writes it; differentiable in all tensors.

        The result holds what `weights` hold, the rule's own state included.
        """

    def state(self, memory: LongTerm) -> Weights:
        """What the rule remembers beside a lane's weights, at the start of an article."""
        return {}

    def bind(self, parameters: Parameters, memory: LongTerm) -> Bound:
        """The fast form; this default evaluates `formula`."""
        return ByFormula(self, parameters, memory)


class ByFormula:
    """Any rule, slowly: `update` is its formula, `pullback` and `advance` differentiate it."""

    def __init__(self, rule: UpdateRule, parameters: Parameters, memory: LongTerm) -> None:
        self.rule, self.parameters, self.memory = rule, parameters, memory
        self._start = {**memory.start(), **rule.state(memory)}

    def start(self) -> Weights:
        """See `Bound.start`."""
        return self._start

    def update(
        self, weights: Weights, gradients: Weights, signal: Signal, out: Weights | None = None
    ) -> Weights:
        """See `Bound.update`."""
        new = self.rule.formula(self.parameters, self.memory, weights, gradients, signal)
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
            new = self.rule.formula(phi, self.memory, theta, gradients, signal)
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
            return self.rule.formula(phi, self.memory, theta, gradients, signal)

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

    def formula(self, parameters, memory, weights, gradients, signal):
        """theta_t = theta_{t-1}."""
        return weights


# -- hand-made rules ----------------------------------------------------------------------------


class HandMade(UpdateRule):
    """A rule whose parameters are a few settings, each one number, or (B,): one per lane."""

    settings: ClassVar[tuple[str, ...]]
    """Names of its parameters."""


@dataclass(frozen=True)
class SGD(HandMade):
    """theta - rate * gradient: dynamic evaluation (Mikolov et al. 2010)."""

    name: str = "sgd"
    settings: ClassVar[tuple[str, ...]] = ("rate",)

    def formula(self, parameters, memory, weights, gradients, signal):
        """Eq. 6 with f = 1, i = -rate, z = 0."""
        rate = parameters["rate"]
        return {n: weights[n] - per_lane(rate, g) * g for n, g in gradients.items()}

    def bind(self, parameters: Parameters, memory: LongTerm) -> Bound:
        """One fused pass."""
        factors: Factors = {n: (torch.ones_like(memory.weights[n]), None) for n in memory.dynamic}
        return Relaxation(self, parameters, memory, factors)


@dataclass(frozen=True)
class Momentum(HandMade):
    """Surprise with momentum, and forgetting (Titans, Behrouz et al. 2025, eqs. 9 to 13).

    S = momentum * S + gradient; theta - rate * S + decay (theta_0 - theta), the paper's gates being
    constants and what is forgotten giving way to theta_0: eq. 6 with f = 1 - decay on S.
    """

    name: str = "momentum"
    settings: ClassVar[tuple[str, ...]] = ("rate", "momentum", "decay")

    def state(self, memory: LongTerm) -> Weights:
        """S = 0."""
        return {f"{n}/momentum": torch.zeros_like(w) for n, w in memory.start().items()}

    def formula(self, parameters, memory, weights, gradients, signal):
        """The surprise, then the step and the decay."""
        new = dict(weights)
        for n, g in gradients.items():
            rate, mu, decay = (per_lane(parameters[key], g) for key in self.settings)
            surprise = mu * weights[f"{n}/momentum"] + g
            pull = decay.clamp(0, 1) * (memory.weights[n] - weights[n])
            new[n] = weights[n] + pull - rate * surprise
            new[f"{n}/momentum"] = surprise
        return new

    def bind(self, parameters: Parameters, memory: LongTerm) -> Bound:
        """A pass for the momentum, one for the weights."""
        ones = {n: torch.ones_like(w) for n, w in memory.start().items()}
        factors: Factors = {n: (one, one) for n, one in ones.items()}
        filters = {n: Filter(n, momentum=parameters["momentum"]) for n in ones}
        return Relaxation(self, parameters, memory, factors, filters)


def scaled_by_rms(memory: LongTerm, name: str, eps: float) -> tuple[Tensor, Tensor]:
    """(1 / (RMS + eps), RMS / mean RMS): what rate and decay multiply in Krause's rule."""
    rms = memory.rms[name]
    return 1 / (rms + eps), rms / memory.mean_rms


@dataclass(frozen=True)
class RMS(HandMade):
    """RMS-scaled dynamic evaluation with decay to theta_0 (Krause et al. 2018, eqs. 5 to 8).

    theta - rate * gradient / (RMS + eps) + z (theta_0 - theta), z = decay * RMS / mean(RMS)
    clipped to 1: eq. 6 with f = 1 - z.
    """

    name: str = "rms"
    eps: float = 2e-5
    settings: ClassVar[tuple[str, ...]] = ("rate", "decay")

    def formula(self, parameters, memory, weights, gradients, signal):
        """Krause's rule written as eq. 6."""
        new = {}
        for n, g in gradients.items():
            scale, relative = scaled_by_rms(memory, n, self.eps)
            i = -per_lane(parameters["rate"], g) * scale
            z = (per_lane(parameters["decay"], g) * relative).clamp(0, 1)
            new[n] = (1 - z) * weights[n] + i * g + z * memory.weights[n]
        return new

    def bind(self, parameters: Parameters, memory: LongTerm) -> Bound:
        """Two factors per weight, computed once."""
        factors: Factors = {n: scaled_by_rms(memory, n, self.eps) for n in memory.dynamic}
        return Relaxation(self, parameters, memory, factors)


@dataclass(frozen=True)
class Adam(HandMade):
    """Adam (Kingma & Ba 2015, algorithm 1) from the moments of training, with Krause's decay.

    m = momentum * m + (1 - momentum) gradient; v = (1 - square) v + square * gradient^2;
    theta - rate * m / (sqrt(v) + eps) + z (theta_0 - theta), z as in `RMS`. m starts at 0 and v at
    RMS^2, which needs no bias correction; with momentum = square = 0 the rule is `RMS`.
    """

    name: str = "adam"
    eps: float = 2e-5
    settings: ClassVar[tuple[str, ...]] = ("rate", "decay", "momentum", "square")

    def state(self, memory: LongTerm) -> Weights:
        """m = 0, v = RMS^2."""
        first = {f"{n}/momentum": torch.zeros_like(w) for n, w in memory.start().items()}
        return first | {f"{n}/square": memory.rms[n].square() for n in memory.dynamic}

    def formula(self, parameters, memory, weights, gradients, signal):
        """The moments, then Krause's rule with their ratio."""
        new = dict(weights)
        for n, g in gradients.items():
            rate, decay, mu, a = (per_lane(parameters[key], g) for key in self.settings)
            m = mu * weights[f"{n}/momentum"] + (1 - mu) * g
            v = (1 - a) * weights[f"{n}/square"] + a * g.square()
            z = (decay * scaled_by_rms(memory, n, self.eps)[1]).clamp(0, 1)
            pull = z * (memory.weights[n] - weights[n])
            new[n] = weights[n] - rate * m / (root(v) + self.eps) + pull
            new |= {f"{n}/momentum": m, f"{n}/square": v}
        return new

    def bind(self, parameters: Parameters, memory: LongTerm) -> Bound:
        """A pass for the moments, one for the weights."""
        mu, square = parameters["momentum"], parameters["square"]
        factors: Factors = {n: scaled_by_rms(memory, n, self.eps) for n in memory.dynamic}
        filters = {
            n: Filter(n, momentum=mu, gain=1 - mu, square=square, rms=memory.rms[n], eps=self.eps)
            for n in memory.dynamic
        }
        return Relaxation(self, parameters, memory, factors, filters)


Factors = dict[str, tuple[Tensor, Tensor | None]]
"""(step, z or None) of every tensor."""


class Relaxation(ByFormula):
    """Fast `update` of the hand-made rules, whose gates are constants.

    Their settings may be (B,): as many are then read side by side, a lane each.
    """

    def __init__(
        self,
        rule: UpdateRule,
        parameters: Parameters,
        memory: LongTerm,
        factors: Factors,
        filters: dict[str, Filter] | None = None,
    ) -> None:
        super().__init__(rule, parameters, memory)
        self.factors, self.filters = factors, filters or {n: Filter(n) for n in factors}
        decay = float(parameters["decay"].max()) if "decay" in parameters else 0.0
        self.clipped = [
            n for n, (_, z) in factors.items() if z is not None and decay * float(z.max()) > 1
        ]

    def update(
        self, weights: Weights, gradients: Weights, signal: Signal, out: Weights | None = None
    ) -> Weights:
        """See `Bound.update`."""
        out = out or {n: torch.empty_like(w) for n, w in weights.items()}
        lanes = len(next(iter(weights.values())))
        rate = self.parameters["rate"].expand(lanes)
        for n, gradient in gradients.items():
            step, z = self.factors[n]
            if n in self.clipped:
                super().update(of_tensor(weights, n), {n: gradient}, signal, of_tensor(out, n))
                continue
            decay = None if z is None else self.parameters["decay"].expand(lanes)
            with self.filters[n].pushed(weights, gradient, out) as move:
                relax(weights[n], move, self.memory.weights[n], step, z, rate, decay, out[n])
        return out


def relax(
    theta: Tensor,
    gradient: Tensor,
    start: Tensor,
    step: Tensor,
    z: Tensor | None,
    step_B: Tensor | None,
    z_B: Tensor | None,
    out: Tensor,
) -> Tensor:
    """out = theta - (step_B step) gradient + (z_B z) (start - theta).

    Args:
        theta, gradient, out: (B, ...); start, step, z: the tensor's own shape (step may be one
            number); z = None: no flush. z_B z must lie in [0, 1] where no kernel clips it.
        step_B, z_B: factors per lane (B,), None = 1.

    One pass in a compiled kernel; without it three, on a CPU one lane at a time, which then stays
    in the cache, on a GPU all lanes at once.
    """
    lanes = theta.shape[0]
    if kernels.usable(theta, gradient, out) and out.is_contiguous():
        ones = theta.new_ones(lanes)
        kernels.share_out(
            kernels.relax,
            kernels.tiles(start.numel()),
            theta.numel(),
            *(t.contiguous().view(lanes, -1) for t in (theta, gradient)),
            start.contiguous().view(-1),
            step.expand(start.shape).contiguous().view(-1),
            theta.new_empty(0) if z is None else z.contiguous().view(-1),
            ones if step_B is None else step_B.contiguous(),
            ones if z_B is None else z_B.contiguous(),
            out.view(lanes, -1),
        )
        return out
    if theta.device.type == "cpu":
        a = [1.0] * lanes if step_B is None else step_B.tolist()
        b = [1.0] * lanes if z_B is None else z_B.tolist()
        for k in range(lanes):
            if z is None:
                torch.addcmul(theta[k], gradient[k], step, value=-a[k], out=out[k])
                continue
            torch.sub(start, theta[k], out=out[k])
            torch.addcmul(theta[k], out[k], z, value=b[k], out=out[k])
            out[k].addcmul_(gradient[k], step, value=-a[k])
        return out
    view = (lanes, *[1] * (theta.dim() - 1))
    move = gradient * step if step_B is None else gradient * (step * step_B.view(view))
    torch.sub(theta, move, out=out)
    if z is not None:
        out.addcmul_(z if z_B is None else z * z_B.view(view), start - theta)
    return out
