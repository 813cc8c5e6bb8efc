"""Fast gates on a gradient with moments, or with learned steps per weight, row and column."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.rules.fast_gates import SQUARE_UNIT, UNIT_STEP, FastGates, FastGatesRule
from mlm.rules.moments import Moments
from mlm.rules.protocol import ByFormula, Parameters, Signal


class MomentGates(FastGates):
    """`FastGates` on a gradient with moments, or with a learned factor per weight, row or column.

    Update and pullback are fast; forward mode differentiates the formula.
    """

    def __init__(self, rule: FastGatesRule, parameters: Parameters, base: AdaptationBase) -> None:
        super().__init__(rule, parameters, base)
        self._moments: dict[str, Moments] = {}
        for name in base.dynamic:
            mu, a = rule.moment_numbers(parameters, base, name)
            given = {"momentum": mu, "square": a, "rms": base.rms[name], "eps": rule.eps}
            self._moments[name] = Moments(name, **given)
        self.has_moments = rule.momentum or rule.square

    def _push(
        self,
        name: str,
        weights: Weights,
        gradient: Tensor,
        signal: Signal,
        z_B: Tensor | None,
        out: Weights,
    ) -> None:
        with self._moments[name].pushed(weights, gradient, out) as move:
            super()._push(name, weights, move, signal, z_B, out)

    def _pull(
        self,
        name: str,
        weights: Weights,
        gradient: Tensor,
        cotangent: Weights,
        signal: Signal,
        z_B: Tensor | None,
        own: float,
        found: Parameters,
    ) -> Weights:
        moments, lam = self._moments[name], cotangent[name]
        step, step_B = self._step[name], self._factor(name, signal)
        move, state, sums = moments.pull(weights, gradient, lam, step, step_B, cotangent)
        group = self.rule.group(self.base, name)
        for part, unit, value in zip(("momentum", "square"), (1, SQUARE_UNIT), sums, strict=True):
            if part in found:
                found[part][group] += unit * value
        if self.rule.per_weight or self.rule.per_unit:
            self._collect_steps(name, step * _products(lam, move, step_B), found)
        back = super()._pull(name, weights, move, {name: lam}, signal, z_B, 0.0, found)
        back[name].add_(gradient, alpha=own)
        buffers.release([move])
        return back | state

    def _collect_steps(self, name: str, products: Tensor, found: Parameters) -> None:
        """Add what a tensor's moves say about steps of weights, rows and columns to `found`."""
        if self.rule.per_weight:
            found[f"step/{name}"] -= products
        if self.rule.per_unit:
            moves = UNIT_STEP * products
            if moves.dim() > 1:
                found[f"column/{name}"] -= moves.sum(0)
                moves = moves.flatten(1).sum(1)
            found[f"row/{name}"] -= moves

    tangent = ByFormula.tangent
    advance = ByFormula.advance
    owed = ByFormula.owed


def _products(a: Tensor, b: Tensor, factor_B: Tensor | None) -> Tensor:
    """sum over lanes of factor_B a b: (B, ...) -> (...)."""
    total = torch.zeros_like(a[0])
    factors = [1.0] * len(a) if factor_B is None else factor_B.tolist()
    for k, factor in enumerate(factors):
        total.addcmul_(a[k], b[k], value=factor)
    return total
