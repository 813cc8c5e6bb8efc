"""Hand-made rules, whose few settings are tuned: SGD, momentum, RMS and Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlm import kernels
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.rules.moments import Moments, root
from mlm.rules.protocol import Bound, ByFormula, Parameters, Signal, UpdateRule, of_tensor, per_lane


class HandMade(UpdateRule):
    """A rule whose parameters are a few settings, each one number, or (B,): one per lane."""

    settings: ClassVar[tuple[str, ...]]
    """Names of its parameters."""


@dataclass(frozen=True)
class SGD(HandMade):
    """theta - rate * gradient: dynamic evaluation (Mikolov et al. 2010)."""

    name: str = "sgd"
    settings: ClassVar[tuple[str, ...]] = ("rate",)

    def formula(self, parameters, base, weights, gradients, signal):
        """Eq. 6 with f = 1, i = -rate, z = 0."""
        rate = parameters["rate"]
        return {n: weights[n] - per_lane(rate, g) * g for n, g in gradients.items()}

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """One fused pass."""
        factors: Factors = {n: (torch.ones_like(base.weights[n]), None) for n in base.dynamic}
        return Relaxation(self, parameters, base, factors)


@dataclass(frozen=True)
class Momentum(HandMade):
    """Surprise with momentum, and forgetting (Titans, Behrouz et al. 2025, eqs. 9 to 13).

    S = momentum * S + gradient; theta - rate * S + decay (theta_0 - theta), the paper's gates being
    constants and what is forgotten giving way to theta_0: eq. 6 with f = 1 - decay on S.
    """

    name: str = "momentum"
    settings: ClassVar[tuple[str, ...]] = ("rate", "momentum", "decay")

    def state(self, base: AdaptationBase) -> Weights:
        """S = 0."""
        return {f"{n}/momentum": torch.zeros_like(w) for n, w in base.start().items()}

    def formula(self, parameters, base, weights, gradients, signal):
        """The surprise, then the step and the decay."""
        new = dict(weights)
        for n, g in gradients.items():
            rate, mu, decay = (per_lane(parameters[key], g) for key in self.settings)
            surprise = mu * weights[f"{n}/momentum"] + g
            pull = decay.clamp(0, 1) * (base.weights[n] - weights[n])
            new[n] = weights[n] + pull - rate * surprise
            new[f"{n}/momentum"] = surprise
        return new

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """A pass for the momentum, one for the weights."""
        ones = {n: torch.ones_like(w) for n, w in base.start().items()}
        factors: Factors = {n: (one, one) for n, one in ones.items()}
        moments = {n: Moments(n, momentum=parameters["momentum"]) for n in ones}
        return Relaxation(self, parameters, base, factors, moments)


def scaled_by_rms(base: AdaptationBase, name: str, eps: float) -> tuple[Tensor, Tensor]:
    """(1 / (RMS + eps), RMS / mean RMS): what rate and decay multiply in Krause's rule."""
    rms = base.rms[name]
    return 1 / (rms + eps), rms / base.mean_rms


@dataclass(frozen=True)
class RMS(HandMade):
    """RMS-scaled dynamic evaluation with decay to theta_0 (Krause et al. 2018, eqs. 5 to 8).

    theta - rate * gradient / (RMS + eps) + z (theta_0 - theta), z = decay * RMS / mean(RMS)
    clipped to 1: eq. 6 with f = 1 - z.
    """

    name: str = "rms"
    eps: float = 2e-5
    settings: ClassVar[tuple[str, ...]] = ("rate", "decay")

    def formula(self, parameters, base, weights, gradients, signal):
        """Krause's rule written as eq. 6."""
        new = {}
        for n, g in gradients.items():
            scale, relative = scaled_by_rms(base, n, self.eps)
            i = -per_lane(parameters["rate"], g) * scale
            z = (per_lane(parameters["decay"], g) * relative).clamp(0, 1)
            new[n] = (1 - z) * weights[n] + i * g + z * base.weights[n]
        return new

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """Two factors per weight, computed once."""
        factors: Factors = {n: scaled_by_rms(base, n, self.eps) for n in base.dynamic}
        return Relaxation(self, parameters, base, factors)


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

    def state(self, base: AdaptationBase) -> Weights:
        """m = 0, v = RMS^2."""
        first = {f"{n}/momentum": torch.zeros_like(w) for n, w in base.start().items()}
        return first | {f"{n}/square": base.rms[n].square() for n in base.dynamic}

    def formula(self, parameters, base, weights, gradients, signal):
        """The moments, then Krause's rule with their ratio."""
        new = dict(weights)
        for n, g in gradients.items():
            rate, decay, mu, a = (per_lane(parameters[key], g) for key in self.settings)
            m = mu * weights[f"{n}/momentum"] + (1 - mu) * g
            v = (1 - a) * weights[f"{n}/square"] + a * g.square()
            z = (decay * scaled_by_rms(base, n, self.eps)[1]).clamp(0, 1)
            pull = z * (base.weights[n] - weights[n])
            new[n] = weights[n] - rate * m / (root(v) + self.eps) + pull
            new |= {f"{n}/momentum": m, f"{n}/square": v}
        return new

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """A pass for the moments, one for the weights."""
        mu, square = parameters["momentum"], parameters["square"]
        factors: Factors = {n: scaled_by_rms(base, n, self.eps) for n in base.dynamic}
        moments = {
            n: Moments(n, momentum=mu, gain=1 - mu, square=square, rms=base.rms[n], eps=self.eps)
            for n in base.dynamic
        }
        return Relaxation(self, parameters, base, factors, moments)


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
        base: AdaptationBase,
        factors: Factors,
        moments: dict[str, Moments] | None = None,
    ) -> None:
        super().__init__(rule, parameters, base)
        self.factors, self.moments = factors, moments or {n: Moments(n) for n in factors}
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
            with self.moments[n].pushed(weights, gradient, out) as move:
                relax_weights(weights[n], move, self.base.weights[n], step, z, rate, decay, out[n])
        return out


def relax_weights(
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
