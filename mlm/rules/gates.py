"""The meta-learner: COPY / UPDATE / FLUSH gates shared by all coordinates (eq. 6).

Letters: B lanes, N weights of a tensor, G groups of tensors, F columns of a gate's features,
O outputs of a network.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.rules.fast_gates import (
    FLUSH_UNIT,
    LANE,
    SQUARE_UNIT,
    UNIT_STEP,
    FastGates,
    MomentGates,
)
from mlm.rules.moments import with_moments
from mlm.rules.networks import LSTM, MLP, Network
from mlm.rules.protocol import (
    Bound,
    ByFormula,
    FastGatesRule,
    LaneByLane,
    Parameters,
    Signal,
    per_lane,
)
from mlm.rules.two_memories import (
    SLOW,
    TwoMemories,
    TwoMemoryRule,
    away,
    joined,
    parts_of,
    slow_name,
    split,
)

Feature = Literal["fisher", "loss", "age", "gradient", "distance"]


COORDINATE = ("gradient", "distance")


GATES = ("update", "flush", "copy")


P_LOG = 10.0


LARGEST_MOMENTUM = 0.999


def preprocess(x: Tensor) -> tuple[Tensor, Tensor]:
    """(log|x|/p, sign x) where |x| > e^-p, else (-1, e^p x); p = 10 (Andrychowicz et al. 2016)."""
    tiny = math.exp(-P_LOG)
    large = x.abs() > tiny
    safe = torch.where(large, x.abs(), torch.ones_like(x))
    log = torch.where(large, safe.log() / P_LOG, torch.full_like(x, -1.0))
    return log, torch.where(large, x.sign(), x / tiny)


@dataclass(frozen=True)
class LinearGates(FastGatesRule, TwoMemoryRule):
    """The meta-learner of eq. 6: gates linear in a few features, shared by all coordinates.

        theta_t = f theta_{t-1} + i g~ + z theta_0
        i = -exp(w . x)               UPDATE, always a step against the gradient
        z = clip(s exp(v . x), 0, 1)  FLUSH towards theta_0
        f = 1 - z + k . x             COPY; k . x is absent unless `free_copy`

    x holds a constant and `features`: `fisher` (log RMS of the weight), `loss` (tanh of segment
    loss minus corpus mean), `age` (1/sqrt(1 + updates since theta_0)), `gradient` (over its RMS)
    and `distance` theta - theta_0, both preprocessed as in Andrychowicz et al. 2016. With
    `per_tensor` every tensor has its own w, s, v, k. g~ is the gradient, after `momentum` and
    `square` if the rule has them (`mlm.rules.moments`), each with a number per group. `per_weight`
    adds a number per weight to w . x (Meta-SGD, Li et al. 2017), `per_unit` one per row and one per
    column of every tensor, `gain` multiplies i by a number per group; `mlp` and `lstm` networks
    that see x add to w . x and v . x (`mlm.rules.networks`).

    With `slow` the weights are theta_0 + a fast and a slow memory of the article, which have gates
    of their own, of the same kind:

        theta_t = theta_0 + F_t + S_t
        F_t = (1 - z) F_{t-1} + i g~        S_t = (1 - z') S_{t-1} + i' g~'

    so that what is soon forgotten and what is kept need not be one compromise (fast weights beside
    slow ones: Hinton and Plaut 1987). i' has a `gain`, at which it starts: zero.

    Every part is exactly without effect until it is trained: a rule starts as what any rule whose
    parts it contains does (`mlm.rules.family.start_at`).
    """

    name: str = "three_levels"
    flush: bool = True
    features: tuple[Feature, ...] = ("fisher", "loss", "age")
    per_tensor: bool = True
    free_copy: bool = False
    eps: float = 2e-5
    momentum: bool = False
    square: bool = False
    per_weight: bool = False
    per_unit: bool = False
    gain: bool = False
    slow: bool = False
    mlp: int = 0
    """Hidden units, 0 = without."""
    lstm: int = 0
    """Hidden units, 0 = without."""
    fixed: tuple[str, ...] = ()
    """What is not trained: features (or `one`, the constant) of all gates, or of one, such as
    `flush.fisher`; whole gates `update`, `flush`, `copy`; or `flush_scale`, `momentum`, `square`,
    `step`, `row`, `column`, `gain`, `mlp`, `lstm`; in both memories alike; or `slow`."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.fixed) - self.fixable)
        if unknown:
            raise UserError(
                f"rule {self.name}: {', '.join(unknown)} cannot be fixed; choose from "
                f"{', '.join(sorted(self.fixable))}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The gates that have parameters."""
        has = {"update": True, "flush": self.flush, "copy": self.free_copy}
        return tuple(kind for kind in GATES if has[kind])

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have parameters, besides the gates' rows."""
        has = {
            "flush_scale": self.flush,
            "momentum": self.momentum,
            "square": self.square,
            "step": self.per_weight,
            "row": self.per_unit,
            "column": self.per_unit,
            "gain": self.gain,
            "slow": self.slow,
            "mlp": self.mlp,
            "lstm": self.lstm,
        }
        return tuple(part for part, there in has.items() if there)

    @property
    def fixable(self) -> set[str]:
        """What `fixed` may hold."""
        columns = ("one", *self.features)
        own = {f"{kind}.{column}" for kind in self.kinds for column in columns}
        return {*columns, *own, *self.kinds, *self.parts}

    @cached_property
    def columns(self) -> dict[str, int]:
        """Column of every feature in a gate's row."""
        names = ["one"]
        for feature in self.features:
            names += [feature, f"{feature}.sign"] if feature in COORDINATE else [feature]
        return {name: k for k, name in enumerate(names)}

    @property
    def has_fast_form(self) -> bool:
        """Gates are (one number per weight) x (one number per lane): the fast path applies."""
        return not (self.free_copy or self.networks or set(COORDINATE) & set(self.features))

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """The networks that add to the gates."""
        return tuple(
            kind(hidden) for kind, hidden in ((MLP, self.mlp), (LSTM, self.lstm)) if hidden
        )

    # -- two memories -----------------------------------------------------------------------

    @cached_property
    def fast(self) -> LinearGates:
        """The gates of the fast memory."""
        return dataclasses.replace(self, slow=False, fixed=self._fixed_of_one)

    @cached_property
    def slowly(self) -> LinearGates:
        """The gates of the slow memory, whose theta_0 is zero (`away`)."""
        return dataclasses.replace(self, slow=False, gain=True, fixed=self._fixed_of_one)

    @property
    def _fixed_of_one(self) -> tuple[str, ...]:
        return tuple(what for what in self.fixed if what != "slow")

    # -- parameters -------------------------------------------------------------------------

    def initial(self, base: AdaptationBase) -> Parameters:
        """Parameters of parts without effect: rows of zeros, and networks that say nothing."""
        if self.slow:
            both = self.fast.initial(base), self.slowly.initial(base)
            return both[0] | {SLOW + n: p for n, p in both[1].items()}
        groups = len(base.dynamic) if self.per_tensor else 1
        like = next(iter(base.rms.values()))
        phi = {"update": like.new_zeros(groups, len(self.columns))}
        if self.flush:
            phi["flush"] = torch.zeros_like(phi["update"])
            phi["flush_scale"] = like.new_zeros(groups)
        if self.free_copy:
            phi["copy"] = torch.zeros_like(phi["update"])
        numbers = {"momentum": self.momentum, "square": self.square, "gain": self.gain}
        phi |= {part: like.new_zeros(groups) for part, there in numbers.items() if there}
        if self.per_weight:
            phi |= {f"step/{n}": torch.zeros_like(w) for n, w in base.start().items()}
        if self.per_unit:
            for n, w in base.start().items():
                phi[f"row/{n}"] = w.new_zeros(len(w))
                if w.dim() > 1:
                    phi[f"column/{n}"] = w.new_zeros(w.shape[1:])
        for network in self.networks:
            phi |= network.initial(len(self.columns), 1 + self.flush, like)
        return phi

    def start_at_sgd(self, base: AdaptationBase, rate: float) -> Parameters:
        """Parameters with which the rule is SGD with this rate."""
        phi = self.initial(base)
        phi["update"][:, 0] = math.log(rate)
        return phi

    def start_at_rms(self, base: AdaptationBase, rate: float, decay: float) -> Parameters:
        """Parameters with which the rule is Krause's (`RMS`), without its decay if no flush."""
        if "fisher" not in self.features:
            raise ValueError("a start at the RMS rule needs the feature 'fisher'")
        phi, column = self.initial(base), self.columns["fisher"]
        phi["update"][:, 0] = math.log(rate / base.mean_rms)
        phi["update"][:, column] = -1.0
        if self.flush:
            phi["flush_scale"].fill_(decay / FLUSH_UNIT)
            phi["flush"][:, column] = 1.0
        return phi

    def project(self, parameters: Parameters) -> None:
        """Bring parameters back to where their parts are alive and stable, in place."""
        if self.slow:
            for half, own in zip((self.fast, self.slowly), parts_of(parameters), strict=True):
                half.project(own)
            return
        if self.flush:
            parameters["flush_scale"].clamp_(min=0)
        if self.momentum:
            parameters["momentum"].clamp_(0, LARGEST_MOMENTUM)
        if self.square:
            parameters["square"].clamp_(0, 1 / SQUARE_UNIT)
        if self.gain:
            parameters["gain"].clamp_(min=0)

    def mask(self, gradients: Parameters) -> None:
        """Zero the gradients of what is `fixed`, in place."""
        if self.slow:
            for half, own in zip((self.fast, self.slowly), parts_of(gradients), strict=True):
                half.mask(own)
            if "slow" in self.fixed:
                for gradient in parts_of(gradients)[1].values():
                    gradient.zero_()
            return
        for kind in self.kinds:
            for column, k in self.columns.items():
                feature = column.partition(".")[0]
                if feature in self.fixed or f"{kind}.{feature}" in self.fixed:
                    gradients[kind][:, k] = 0
        for name, gradient in gradients.items():
            if name.partition("/")[0].partition(".")[0] in self.fixed:
                gradient.zero_()

    def state(self, base: AdaptationBase) -> Weights:
        """S = 0, v = RMS^2, what networks remember of every weight, and an empty slow memory."""
        if self.slow:
            far = away(base)
            own = far.start() | self.slowly.state(far)
            return self.fast.state(base) | {slow_name(n): w for n, w in own.items()}
        found: Weights = {}
        for name, weights in base.start().items():
            if self.momentum:
                found[f"{name}/momentum"] = torch.zeros_like(weights)
            if self.square:
                found[f"{name}/square"] = base.rms[name].square()
            for network in self.networks:
                found |= {f"{name}/{n}": x for n, x in network.state(weights).items()}
        return found

    # -- features ---------------------------------------------------------------------------

    def group(self, base: AdaptationBase, name: str) -> int:
        """Row of the parameters that serves this tensor."""
        return base.dynamic.index(name) if self.per_tensor else 0

    def lane_features(self, base: AdaptationBase, signal: Signal) -> dict[str, Tensor]:
        """Features that are one number per lane, (B,) each."""
        values = {"loss": (signal.loss - base.loss).tanh(), "age": torch.rsqrt(1.0 + signal.age)}
        return {name: values[name] for name in LANE if name in self.features}

    def fisher(self, base: AdaptationBase, name: str, gate: str) -> Tensor:
        """log(RMS / mean RMS); UPDATE adds Krause's eps to the RMS first."""
        rms = base.rms[name]
        floor = rms.clamp(min=1e-30) if gate == "flush" else rms + self.eps
        return (floor / base.mean_rms).log()

    def weight_part(self, row_F: Tensor, base: AdaptationBase, name: str, gate: str) -> Tensor:
        """Part of a gate's w . x that is one number per weight: the tensor's shape."""
        total = row_F[0].expand(base.rms[name].shape)
        if "fisher" in self.features:
            total = total + row_F[self.columns["fisher"]] * self.fisher(base, name, gate)
        return total

    def lane_part(self, row_F: Tensor, base: AdaptationBase, signal: Signal) -> Tensor | None:
        """Part of w . x that is one number per lane: (B,)."""
        parts = [
            row_F[self.columns[name]] * value
            for name, value in self.lane_features(base, signal).items()
        ]
        return torch.stack(parts).sum(0) if parts else None

    def _coordinate(
        self, feature: str, base: AdaptationBase, name: str, theta: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two columns of a feature that differs for every lane and weight: (B, ...)."""
        if feature == "gradient":
            return preprocess(gradient / (base.rms[name] + self.eps))
        return preprocess(theta - base.weights[name])

    def _coordinate_part(
        self, row_F: Tensor, base: AdaptationBase, name: str, theta: Tensor, gradient: Tensor
    ) -> Tensor | None:
        """Part of w . x that differs for every lane and weight: (B, ...)."""
        total = None
        for feature in (f for f in COORDINATE if f in self.features):
            log, sign = self._coordinate(feature, base, name, theta, gradient)
            column = self.columns[feature]
            part = row_F[column] * log + row_F[column + 1] * sign
            total = part if total is None else total + part
        return total

    def inputs(
        self, base: AdaptationBase, name: str, theta: Tensor, gradient: Tensor, signal: Signal
    ) -> Tensor:
        """x of every weight, (B, F, ...), as networks see it: `fisher` is UPDATE's."""
        lane = self.lane_features(base, signal)
        found = [torch.ones_like(theta)]
        for feature in self.features:
            if feature == "fisher":
                found.append(self.fisher(base, name, "update").expand_as(theta))
            elif feature in lane:
                found.append(per_lane(lane[feature], theta).expand_as(theta))
            else:
                found += self._coordinate(feature, base, name, theta, gradient)
        return torch.stack(found, 1)

    # -- the rule ---------------------------------------------------------------------------

    def weight_logs(
        self, parameters: Parameters, base: AdaptationBase, name: str, gate: str
    ) -> Tensor:
        """Logarithm of a gate's factor per weight: the tensor's shape."""
        total = self.weight_part(parameters[gate][self.group(base, name)], base, name, gate)
        if gate != "update":
            return total
        if self.per_weight:
            total = total + parameters[f"step/{name}"]
        if self.per_unit:
            row = parameters[f"row/{name}"]
            total = total + UNIT_STEP * row.view(-1, *[1] * (total.dim() - 1))
            if total.dim() > 1:
                total = total + UNIT_STEP * parameters[f"column/{name}"]
        return total

    def gates(
        self,
        parameters: Parameters,
        base: AdaptationBase,
        name: str,
        theta: Tensor,
        gradient: Tensor,
        signal: Signal,
        said: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(f, i, z) of eq. 6 for one tensor, each broadcastable to (B, ...).

        `said` (B, O, ...) is what networks add to the logarithms of UPDATE and FLUSH.
        """
        group = self.group(base, name)

        def linear(kind: str) -> Tensor:
            row = parameters[kind][group]
            total = self.weight_logs(parameters, base, name, kind).unsqueeze(0)
            lane = self.lane_part(row, base, signal)
            if lane is not None:
                total = total + per_lane(lane, theta)
            own = self._coordinate_part(row, base, name, theta, gradient)
            total = total if own is None else total + own
            return total if said is None or kind == "copy" else total + said[:, GATES.index(kind)]

        i = -linear("update").exp()
        if self.gain:
            i = i * parameters["gain"][group]
        z = torch.zeros_like(i[:1])
        if self.flush:
            scale = parameters["flush_scale"][group] * FLUSH_UNIT
            z = (scale * linear("flush").exp()).clamp(0, 1)
        f = 1 - z
        if self.free_copy:
            f = f + FLUSH_UNIT * linear("copy")
        return f, i, z

    def moment_numbers(
        self, parameters: Parameters, base: AdaptationBase, name: str
    ) -> tuple[Tensor | None, Tensor | None]:
        """(mu, a) of a tensor's moments, None = without."""
        group = self.group(base, name)
        mu = parameters["momentum"][group] if self.momentum else None
        return mu, SQUARE_UNIT * parameters["square"][group] if self.square else None

    def _said(
        self,
        parameters: Parameters,
        base: AdaptationBase,
        weights: Weights,
        name: str,
        gradient: Tensor,
        signal: Signal,
    ) -> tuple[Tensor | None, Weights]:
        """(what the networks add to a tensor's gates (B, O, ...), their state after it)."""
        if not self.networks:
            return None, {}
        x = self.inputs(base, name, weights[name], gradient, signal)
        said, after = [], {}
        for network in self.networks:
            before = {n: weights[f"{name}/{n}"] for n in network.remembers}
            own, state = network.say(parameters, x, before)
            said.append(own)
            after |= {f"{name}/{n}": value for n, value in state.items()}
        return torch.stack(said).sum(0), after

    def formula(self, parameters, base, weights, gradients, signal):
        """Eq. 6, literally; of two memories, each one's."""
        if self.slow:
            near, far = split(weights, base.dynamic)
            own, others = parts_of(parameters)
            near = self.fast.formula(own, base, near, gradients, signal)
            far = self.slowly.formula(others, away(base), far, gradients, signal)
            return joined(near, far)
        new = dict(weights)
        for name, gradient in gradients.items():
            numbers = self.moment_numbers(parameters, base, name)
            scale = base.rms[name] + self.eps
            move, moments = with_moments(name, weights, gradient, *numbers, scale, self.eps)
            said, hidden = self._said(parameters, base, weights, name, gradient, signal)
            theta = weights[name]
            f, i, z = self.gates(parameters, base, name, theta, gradient, signal, said)
            new[name] = f * theta + i * move + z * base.weights[name]
            new |= moments | hidden
        return new

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """The fast form where there is one; networks get their formula in pieces."""
        if self.slow:
            return TwoMemories(self, parameters, base)
        if self.networks:
            return LaneByLane(self, parameters, base)
        if not self.has_fast_form:
            return ByFormula(self, parameters, base)
        if self.momentum or self.square or self.per_weight or self.per_unit or self.gain:
            return MomentGates(self, parameters, base)
        return FastGates(self, parameters, base)
