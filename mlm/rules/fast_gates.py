"""Fast forms of gates that are (a factor per weight) x (a factor per lane).

Letters: B lanes, N weights of a tensor, K copies in a tangent, C lane inputs of a gate.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mlm import kernels
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.rules.forward import Tangent, dots, push_tensor, zero_tangent
from mlm.rules.hand_made import relax_weights
from mlm.rules.moments import Moments
from mlm.rules.protocol import ByFormula, FastGatesRule, Parameters, Signal, of_tensor

LANE = ("loss", "age")
"""Features that are one number per lane."""


SQUARE_UNIT = 1e-2
"""What a second moment forgets per update is learned in hundredths: its memory is a long one."""


FLUSH_UNIT = 1e-3
"""FLUSH and COPY are learned in thousandths per update, the size of Krause's decay."""


UNIT_STEP = 0.5
"""The steps of rows and columns are learned in halves: they are many, and each is seen little."""


class FastGates(ByFormula):
    """`LinearGates` whose gates are a factor per weight times a factor per lane.

    The factors per weight are computed once; an update is then three passes over the weights, the
    pullback about eight, with the parameters' gradients as dot products. Tensors in which a FLUSH
    gate touches its clip take the formula instead.
    """

    rule: FastGatesRule

    def __init__(self, rule: FastGatesRule, parameters: Parameters, base: AdaptationBase) -> None:
        super().__init__(rule, parameters, base)
        self._step: Weights = {}
        self._flush: Weights = {}
        self._steps: Weights = {}
        """(2, N): the gate's factor per weight, and times `fisher`."""
        self._units: Weights = {}
        """(2, N), or (2, 0) without FLUSH: the same of FLUSH's unit move."""
        self._z: dict[str, Tensor | None] = dict.fromkeys(base.dynamic)
        self._highest: dict[str, float] = {}
        for name in base.dynamic:
            step = rule.weight_logs(parameters, base, name, "update").exp()
            fisher = rule.fisher(base, name, "update")
            self._steps[name] = torch.stack([step, step * fisher]).view(2, -1)
            self._step[name] = self._steps[name][0].view_as(step)
            self._units[name] = self._steps[name][:, :0].contiguous()
            if rule.flush:
                unit = FLUSH_UNIT * rule.weight_logs(parameters, base, name, "flush").exp()
                fisher = rule.fisher(base, name, "flush")
                self._units[name] = torch.stack([unit, unit * fisher]).view(2, -1)
                self._flush[name] = self._units[name][0].view_as(unit)
                z = self._z[name] = unit * self._scale(name)
                self._highest[name] = float(z.max())

    def _lane(self, kind: str, name: str, signal: Signal) -> Tensor | None:
        row = self.parameters[kind][self.rule.group(self.base, name)]
        part = self.rule.lane_part(row, self.base, signal)
        return None if part is None else part.exp()

    has_moments = False
    """Whether it acts on another gradient than the segment's."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """UPDATE and FLUSH of every weight of a tensor, without the lanes' factors."""
        z = self._z[name]
        assert z is not None
        return self._step[name], z

    def lane_factors(self, name: str, signal: Signal) -> tuple[Tensor | None, Tensor | None]:
        """What multiplies `factors` in each lane, (B,); None = 1."""
        return self._factor(name, signal), self._lane("flush", name, signal)

    def _factor(self, name: str, signal: Signal) -> Tensor | None:
        """UPDATE's factor per lane, with its gain."""
        a_B = self._lane("update", name, signal)
        if not self.rule.gain:
            return a_B
        gain = self.parameters["gain"][self.rule.group(self.base, name)]
        return gain.expand(len(signal.loss)) if a_B is None else gain * a_B

    def _scale(self, name: str) -> Tensor:
        if not self.rule.flush:
            return torch.zeros_like(self._steps[name][0, 0])
        return self.parameters["flush_scale"][self.rule.group(self.base, name)]

    def _split(
        self, signal: Signal, *tensors: Weights
    ) -> tuple[list[str], list[str], dict[str, Tensor | None]]:
        """(tensors that are read at once, the others, FLUSH factor per lane).

        The others are those whose FLUSH is clipped somewhere, unless `tensors` can go through a
        kernel, which clips.
        """
        inside, outside, factors = [], [], {}
        for name in self.base.dynamic:
            if not self.rule.flush:
                inside.append(name)
                continue
            b = factors[name] = self._lane("flush", name, signal)
            given = [some[name] for some in tensors]
            fits = kernels.usable(*given) and all(t.is_contiguous() for t in given)
            if not fits:
                fits = self._highest[name] * (1.0 if b is None else float(b.max())) <= 1
            (inside if fits and float(self._scale(name)) >= 0 else outside).append(name)
        return inside, outside, factors

    def update(
        self, weights: Weights, gradients: Weights, signal: Signal, out: Weights | None = None
    ) -> Weights:
        """See `Bound.update`."""
        out = out or {n: torch.empty_like(w) for n, w in weights.items()}
        inside, outside, factors = self._split(signal, weights, gradients, out)
        for name in inside:
            self._push(name, weights, gradients[name], signal, factors.get(name), out)
        for name in outside:
            own, gradient = of_tensor(weights, name), {name: gradients[name]}
            super().update(own, gradient, signal, of_tensor(out, name))
        return out

    def _push(
        self,
        name: str,
        weights: Weights,
        gradient: Tensor,
        signal: Signal,
        z_B: Tensor | None,
        out: Weights,
    ) -> None:
        """One tensor's update with this gradient, into `out`; `z_B` is FLUSH's factor per lane."""
        step_B = self._factor(name, signal)
        rest = self._step[name], self._z[name], step_B, z_B, out[name]
        relax_weights(weights[name], gradient, self.base.weights[name], *rest)

    def pullback(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        cotangent: Weights,
        own: float = 0.0,
    ) -> tuple[Weights, Parameters]:
        """See `Bound.pullback`."""
        inside, outside, factors = self._split(signal, weights, gradients, cotangent)
        found = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        back: Weights = {}
        for name in outside:
            some, gradient = of_tensor(weights, name), {name: gradients[name]}
            lam = {n: cotangent[n] for n in some}
            one, more = super().pullback(some, gradient, signal, lam, own)
            back |= one
            for key, value in more.items():
                found[key] += value
        for name in inside:
            given = of_tensor(weights, name), gradients[name], of_tensor(cotangent, name)
            back |= self._pull(name, *given, signal, factors.get(name), own, found)
        return {name: back[name] for name in weights}, found

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
        """One tensor's part of `pullback`; what it says of the parameters is added to `found`."""
        tensors = weights[name], gradient, cotangent[name]
        pull = self._pull_compiled if kernels.usable(*tensors) else self._pull_eager
        back, sums_B4 = pull(name, *tensors, z_B, own)
        self._collect(name, sums_B4, signal, z_B, found)
        return {name: back}

    def _pull_compiled(
        self,
        name: str,
        theta: Tensor,
        gradient: Tensor,
        lam: Tensor,
        z_B: Tensor | None,
        own: float,
    ) -> tuple[Tensor, Tensor]:
        """One pass of `kernels.pull_back`; arguments and results of `_pull_eager`."""
        lanes, size = theta.shape[0], theta[0].numel()
        lam = lam.contiguous()
        sums = theta.new_zeros(kernels.tiles(size), lanes, 4)
        kernels.share_out(
            kernels.pull_back,
            len(sums),
            theta.numel(),
            *(t.contiguous().view(lanes, -1) for t in (theta, gradient, lam)),
            self.base.weights[name].contiguous().view(-1),
            self._steps[name],
            self._units[name],
            torch.ones_like(sums[0, :, 0]) if z_B is None else z_B,
            torch.stack([self._scale(name), sums.new_tensor(own)]),
            sums,
        )
        return lam, sums.sum(0)

    def _pull_eager(
        self,
        name: str,
        theta: Tensor,
        gradient: Tensor,
        lam: Tensor,
        z_B: Tensor | None,
        own: float,
    ) -> tuple[Tensor, Tensor]:
        """lam (1 - z) + own gradient of one tensor; sums (B, 4) of its moves.

        The sums are those of lam gradient step and of lam (theta_0 - theta) unit, plain and times
        `fisher`, lane by lane.
        """
        lanes = theta.shape[0]
        sums_B4 = theta.new_zeros(lanes, 4)
        product, back = torch.empty_like(theta[0]), torch.empty_like(theta)
        start, z = self.base.weights[name], self._z[name]
        b = [1.0] * lanes if z_B is None else z_B.tolist()
        for k in range(lanes):
            sums_B4[k, :2] = self._steps[name] @ torch.mul(lam[k], gradient[k], out=product).view(
                -1
            )
            torch.mul(gradient[k], own, out=back[k]).add_(lam[k])
            if z is not None:
                flat = torch.sub(start, theta[k], out=product).mul_(lam[k]).view(-1)
                sums_B4[k, 2:] = self._units[name] @ flat
                back[k].addcmul_(lam[k], z, value=-b[k])
        return back, sums_B4

    def _collect(
        self,
        name: str,
        sums_B4: Tensor,
        signal: Signal,
        z_B: Tensor | None,
        found: Parameters,
    ) -> None:
        """Add what one tensor's moves say about the parameters to `found`."""
        group = self.rule.group(self.base, name)
        a_B, moves_2B = self._factor(name, signal), -sums_B4[:, :2].t()
        self._spread(found["update"][group], moves_2B if a_B is None else moves_2B * a_B, signal)
        if self.rule.gain:
            a_B = self._lane("update", name, signal)
            found["gain"][group] += (moves_2B[0] if a_B is None else moves_2B[0] * a_B).sum()
        if self.rule.flush:
            moves_2B = sums_B4[:, 2:].t() if z_B is None else sums_B4[:, 2:].t() * z_B
            found["flush_scale"][group] += moves_2B[0].sum()
            self._spread(found["flush"][group], moves_2B * self._scale(name), signal)

    def _spread(self, row_F: Tensor, sums_2B: Tensor, signal: Signal) -> None:
        """Add a gate's derivatives: sums of the moves, plain and weighted by `fisher`."""
        columns = self.rule.columns
        row_F[0] += sums_2B[0].sum()
        if "fisher" in columns:
            row_F[columns["fisher"]] += sums_2B[1].sum()
        for name, value in self.rule.lane_features(self.base, signal).items():
            row_F[columns[name]] += (sums_2B[0] * value).sum()

    # -- forward mode -----------------------------------------------------------------------

    @cached_property
    def _fishers(self) -> dict[str, list[Tensor]]:
        rule, kinds = self.rule, ("update", "flush")[: 1 + self.rule.flush]
        use = kinds if "fisher" in rule.features else ()
        return {n: [rule.fisher(self.base, n, k) for k in use] for n in self.base.dynamic}

    def tangent(self, lanes: int) -> Tangent:
        """See `Bound.tangent`.

        K = (number of gates) x C copies, laid out (gate, lane input): UPDATE, then FLUSH (of its
        unit move, see `push_tensor`); the constant, then the rule's lane features. S by a tensor's
        own row is all there is, and `fisher` needs no copy (see `dots`).
        """
        inputs = 1 + sum(name in self.rule.features for name in LANE)
        return zero_tangent(self.base.start(), (1 + self.rule.flush) * inputs, lanes)

    def advance(
        self,
        weights: Weights,
        gradients: Weights,
        signal: Signal,
        tangent: Tangent,
        found: Parameters,
    ) -> None:
        """See `Bound.advance`."""
        rule, base = self.rule, self.base
        features = rule.lane_features(base, signal)
        inputs_CB = torch.stack([torch.ones_like(signal.loss), *features.values()])
        for name, copies in tangent.items():
            scale = float(self._scale(name))
            tensors = copies, weights[name], gradients[name], base.weights[name]
            rest = (
                self._step[name],
                self._flush.get(name),
                self._lane("update", name, signal),
                self._lane("flush", name, signal) if rule.flush else None,
                scale,
                inputs_CB,
            )
            if kernels.usable(*tensors):
                sums = self._push_compiled(name, *tensors, *rest)
            else:
                sums = dots(copies, gradients[name], 1 + rule.flush, self._fishers[name])
                push_tensor(*tensors, *rest)
            self._owe(name, sums, signal, found)

    def owed(self, tangent: Tangent, cotangent: Weights, signal: Signal, found: Parameters) -> None:
        """See `Bound.owed`."""
        for name, value in cotangent.items():
            sums = dots(tangent[name], value, 1 + self.rule.flush, self._fishers[name])
            self._owe(name, sums, signal, found)

    def _owe(self, name: str, sums: Tensor, signal: Signal, found: Parameters) -> None:
        """Add one tensor's `dots` to the parameters they belong to."""
        rule = self.rule
        features = rule.lane_features(self.base, signal)
        last = ("fisher",) if "fisher" in rule.features else ()
        at = [rule.columns[column] for column in ("one", *features, *last)]
        group = rule.group(self.base, name)
        found["update"][group, at] += sums[0]
        if rule.flush:
            found["flush_scale"][group] += sums[1, 0]
            found["flush"][group, at] += self._scale(name) * sums[1]

    def _push_compiled(
        self,
        name: str,
        tangent: Tensor,
        theta: Tensor,
        gradient: Tensor,
        start: Tensor,
        step: Tensor,
        unit: Tensor | None,
        step_B: Tensor | None,
        unit_B: Tensor | None,
        scale: float,
        inputs_CB: Tensor,
    ) -> Tensor:
        """One pass of `kernels.push_forward`; returns what `forward.dots` does."""
        gates, lanes, columns = 1 + self.rule.flush, theta.shape[0], len(inputs_CB)
        ones = torch.ones_like(inputs_CB[0])
        fishers = self._fishers[name]
        weighted = torch.stack(fishers) if fishers else start.new_zeros(gates, *start.shape)
        sums = theta.new_zeros(kernels.tiles(start.numel()), lanes, gates, columns + 1)
        kernels.share_out(
            kernels.push_forward,
            len(sums),
            tangent.numel(),
            tangent.view(len(tangent), lanes, -1),
            *(t.contiguous().view(lanes, -1) for t in (theta, gradient)),
            *(t.contiguous().view(-1) for t in (start, step)),
            start.new_empty(0) if unit is None else unit.contiguous().view(-1),
            weighted.view(gates, -1),
            ones if step_B is None else step_B.contiguous(),
            ones if unit_B is None else unit_B.contiguous(),
            start.new_full((1,), scale),
            inputs_CB.contiguous(),
            sums,
        )
        return sums.sum((0, 1))[:, : columns + bool(fishers)]


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
