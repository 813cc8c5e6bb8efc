"""The meta-learner: linear COPY / UPDATE / FLUSH gates shared by all coordinates (eq. 6).

Letters: B lanes, N weights of a tensor, G groups of tensors, F columns of a gate's features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mlm.learner import Bound, ByFormula, Parameters, Signal, UpdateRule
from mlm.memory import LongTerm
from mlm.separable import FLUSH_UNIT, LANE, SeparableGates

Feature = Literal["fisher", "loss", "age", "gradient", "distance"]
COORDINATE = ("gradient", "distance")
P_LOG = 10.0


def preprocess(x: Tensor) -> tuple[Tensor, Tensor]:
    """(log|x|/p, sign x) where |x| > e^-p, else (-1, e^p x); p = 10 (Andrychowicz et al. 2016)."""
    tiny = math.exp(-P_LOG)
    large = x.abs() > tiny
    safe = torch.where(large, x.abs(), torch.ones_like(x))
    log = torch.where(large, safe.log() / P_LOG, torch.full_like(x, -1.0))
    return log, torch.where(large, x.sign(), x / tiny)


@dataclass(frozen=True)
class LinearGates(UpdateRule):
    """The meta-learner of eq. 6: gates linear in a few features, shared by all coordinates.

        i = -exp(w . x)               UPDATE, always a step against the gradient
        z = clip(s exp(v . x), 0, 1)  FLUSH towards theta_0
        f = 1 - z + k . x             COPY; k . x is absent unless `free_copy`

    x holds a constant and `features`: `fisher` (log RMS of the weight), `loss` (tanh of segment
    loss minus corpus mean), `age` (1/sqrt(1 + updates since theta_0)), `gradient` (over its RMS)
    and `distance` theta - theta_0, both preprocessed as in Andrychowicz et al. 2016. With
    `per_tensor` every tensor has its own w, s, v, k. The rule starts exactly at SGD or at
    Krause's rule (`start_at_sgd`, `start_at_rms`) and is trained from there.
    """

    name: str = "three_levels"
    flush: bool = True
    features: tuple[Feature, ...] = ("fisher", "loss", "age")
    per_tensor: bool = True
    free_copy: bool = False
    eps: float = 2e-5

    @cached_property
    def columns(self) -> dict[str, int]:
        """Column of every feature in a gate's row."""
        names = ["one"]
        for feature in self.features:
            names += [feature, f"{feature}.sign"] if feature in COORDINATE else [feature]
        return {name: k for k, name in enumerate(names)}

    @property
    def separable(self) -> bool:
        """Gates are (one number per weight) x (one number per lane): the fast path applies."""
        return not self.free_copy and not set(COORDINATE) & set(self.features)

    # -- parameters -------------------------------------------------------------------------

    def _zeros(self, memory: LongTerm) -> Parameters:
        groups = len(memory.dynamic) if self.per_tensor else 1
        like = next(iter(memory.rms.values()))
        phi = {"update": like.new_zeros(groups, len(self.columns))}
        if self.flush:
            phi["flush"] = torch.zeros_like(phi["update"])
            phi["flush_scale"] = like.new_zeros(groups)
        if self.free_copy:
            phi["copy"] = torch.zeros_like(phi["update"])
        return phi

    def start_at_sgd(self, memory: LongTerm, rate: float) -> Parameters:
        """Parameters with which the rule is SGD with this rate."""
        phi = self._zeros(memory)
        phi["update"][:, 0] = math.log(rate)
        return phi

    def start_at_rms(self, memory: LongTerm, rate: float, decay: float) -> Parameters:
        """Parameters with which the rule is Krause's (`RMS`), without its decay if no flush."""
        if "fisher" not in self.features:
            raise ValueError("a start at the RMS rule needs the feature 'fisher'")
        phi, column = self._zeros(memory), self.columns["fisher"]
        phi["update"][:, 0] = math.log(rate / memory.mean_rms)
        phi["update"][:, column] = -1.0
        if self.flush:
            phi["flush_scale"].fill_(decay / FLUSH_UNIT)
            phi["flush"][:, column] = 1.0
        return phi

    def project(self, parameters: Parameters) -> None:
        """Bring parameters back to where gates are alive, in place: a flush is never negative."""
        if self.flush:
            parameters["flush_scale"].clamp_(min=0)

    # -- features ---------------------------------------------------------------------------

    def group(self, memory: LongTerm, name: str) -> int:
        """Row of the parameters that serves this tensor."""
        return memory.dynamic.index(name) if self.per_tensor else 0

    def lane_features(self, memory: LongTerm, signal: Signal) -> dict[str, Tensor]:
        """Features that are one number per lane, (B,) each."""
        values = {"loss": (signal.loss - memory.loss).tanh(), "age": torch.rsqrt(1.0 + signal.age)}
        return {name: values[name] for name in LANE if name in self.features}

    def fisher(self, memory: LongTerm, name: str, gate: str) -> Tensor:
        """log(RMS / mean RMS); UPDATE adds Krause's eps to the RMS first."""
        rms = memory.rms[name]
        floor = rms.clamp(min=1e-30) if gate == "flush" else rms + self.eps
        return (floor / memory.mean_rms).log()

    def weight_part(self, row_F: Tensor, memory: LongTerm, name: str, gate: str) -> Tensor:
        """Part of a gate's w . x that is one number per weight: the tensor's shape."""
        total = row_F[0].expand(memory.rms[name].shape)
        if "fisher" in self.features:
            total = total + row_F[self.columns["fisher"]] * self.fisher(memory, name, gate)
        return total

    def lane_part(self, row_F: Tensor, memory: LongTerm, signal: Signal) -> Tensor | None:
        """Part of w . x that is one number per lane: (B,)."""
        parts = [
            row_F[self.columns[name]] * value
            for name, value in self.lane_features(memory, signal).items()
        ]
        return torch.stack(parts).sum(0) if parts else None

    def _coordinate_part(
        self, row_F: Tensor, memory: LongTerm, name: str, theta: Tensor, gradient: Tensor
    ) -> Tensor | None:
        """Part of w . x that differs for every lane and weight: (B, ...)."""
        total = None
        for feature in (f for f in COORDINATE if f in self.features):
            x = theta - memory.weights[name]
            if feature == "gradient":
                x = gradient / (memory.rms[name] + self.eps)
            log, sign = preprocess(x)
            column = self.columns[feature]
            part = row_F[column] * log + row_F[column + 1] * sign
            total = part if total is None else total + part
        return total

    # -- the rule ---------------------------------------------------------------------------

    def gates(
        self,
        parameters: Parameters,
        memory: LongTerm,
        name: str,
        theta: Tensor,
        gradient: Tensor,
        signal: Signal,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(f, i, z) of eq. 6 for one tensor, each broadcastable to (B, ...)."""
        group = self.group(memory, name)

        def linear(kind: str) -> Tensor:
            row = parameters[kind][group]
            total = self.weight_part(row, memory, name, kind).unsqueeze(0)
            lane = self.lane_part(row, memory, signal)
            if lane is not None:
                total = total + lane.view(-1, *[1] * (theta.dim() - 1))
            own = self._coordinate_part(row, memory, name, theta, gradient)
            return total if own is None else total + own

        i = -linear("update").exp()
        z = torch.zeros_like(i[:1])
        if self.flush:
            scale = parameters["flush_scale"][group] * FLUSH_UNIT
            z = (scale * linear("flush").exp()).clamp(0, 1)
        f = 1 - z
        if self.free_copy:
            f = f + FLUSH_UNIT * linear("copy")
        return f, i, z

    def formula(self, parameters, memory, weights, gradients, signal):
        """Eq. 6, literally."""
        new = {}
        for name, theta in weights.items():
            f, i, z = self.gates(parameters, memory, name, theta, gradients[name], signal)
            new[name] = f * theta + i * gradients[name] + z * memory.weights[name]
        return new

    def bind(self, parameters: Parameters, memory: LongTerm) -> Bound:
        """Separable gates get the fast form, the others their formula."""
        if self.separable:
            return SeparableGates(self, parameters, memory)
        return ByFormula(self, parameters, memory)
