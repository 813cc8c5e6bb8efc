"""A meta-gradient without back-propagation: persistent evolution strategies.

N pairs of particles read the same text under parameters phi + eps and phi - eps, with eps drawn
anew for every unroll, and keep their readers from unroll to unroll. The loss of a segment is
credited to all perturbations that made the weights it was read under, xi = the sum of their eps:

    gradient = 1/(2 N sigma^2) sum over particles, lanes and segments of xi loss

Its mean is the gradient of the loss of the whole reading, however short the unrolls are (Vicol,
Metz and Sohl-Dickstein 2021, arXiv 2112.13835); a truncated gradient knows only of what happens
inside its unroll. Letters: N pairs, B lanes, T segments of an unroll, P numbers in the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.processes import ranks
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.reading import step as rollout
from mlm.reading.meta_gradient import Whole, whole_of
from mlm.reading.step import Step, begin
from mlm.rules.protocol import Bound, Parameters
from mlm.text.streams import Segment


class LearnedRule(Protocol):
    """What the estimate needs of an update rule."""

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """See `UpdateRule.bind`."""
        ...

    def project(self, parameters: Parameters) -> None:
        """Bring parameters back within their bounds, in place."""
        ...

    def mask(self, gradients: Parameters) -> None:
        """Zero what belongs to numbers that are not trained, in place."""
        ...


class Estimate(NamedTuple):
    """Result of one unroll."""

    loss: float
    """Nats per token over all segments of the unroll, mean over the particles."""
    tokens: int
    """Tokens of the unroll; every particle reads them."""
    gradients: Parameters
    """By the rule's parameters."""
    flushed: int
    """How often the guard reset a lane of a particle."""


class Evolution:
    """Persistent evolution strategies: 2N particles, and what they carry between unrolls.

    Each particle is a `Reader` of B lanes with weights of their own: 2N copies of the lanes'
    dynamic weights are kept, 2NB numbers per parameter, and beside them the gradients and new
    weights of one particle, which is what ordinary reading needs. Nothing grows with the unroll.

    The estimate differs from `rollout.meta_gradient` in three ways. *Every* segment of the unroll
    counts in the loss, the first too: its weights are older than the unroll, but what made them is
    not forgotten. Nothing is a constant: how theta changes the inner gradients, the signals and the
    hidden state is part of it. And it is the gradient of the loss *smoothed* by the perturbations,
    which differs from that of the loss itself by O(sigma^2); what is even in eps (the loss itself,
    its curvature) cancels within a pair. It is exact on average while the parameters stand still;
    if they move between unrolls, readers remember those of before, as they do in any training that
    carries them on.

    Credit is given per lane. At an article border a lane starts from theta_0 and a zero state,
    which no perturbation has touched, so xi is zero there and the past of other articles adds no
    noise; a perturbation is added with the first update that it takes part in. Where the guard
    resets a lane xi is zero too: what parameters do to *whether* it resets is left out, as it is of
    the meta-gradient.

    Parameters with bounds are read as `rule.project(phi + eps)` and credited with eps itself. The
    estimate then is the gradient of the smoothed loss of the rule as it runs, bounds included: at a
    bound the direction beyond it counts as flat, it is not ignored. Numbers that `rule.mask` says
    are not trained are not perturbed either.
    """

    def __init__(
        self,
        base: AdaptationBase,
        rule: LearnedRule,
        parameters: Parameters,
        lanes: int,
        *,
        pairs: int,
        sigma: float,
        seed: int,
        scale: Mapping[str, float] | None = None,
        ewc: float = 0.0,
    ) -> None:
        """2N particles that know nothing but the long-term memory.

        Args:
            parameters: those of the rule, for their names and sizes.
            lanes: B of every particle.
            pairs: N.
            sigma: standard deviation of the perturbations.
            seed: of the perturbations.
            scale: by parameter, what sigma is multiplied with; 1 where nothing is said. For those
                whose unit is not about one (logarithms are).
            ewc: strength of the penalty (ewc/2) mean over lanes and segments of
                sum F (theta - theta_0)^2, F = rms^2, theta the weights a segment is read under
                (Kirkpatrick et al. 2017, eq. 3). Part of the objective, not of the loss returned.

        Raises:
            UserError: no pair, a sigma or scale that is not positive, a scale without parameter.
        """
        scale = dict(scale or {})
        _check(pairs, sigma, scale, parameters)
        self.base, self.rule, self.ewc = base, rule, ewc
        self.generator = torch.Generator().manual_seed(seed)
        spread = {
            n: torch.full_like(p, sigma * scale.get(n, 1.0), dtype=torch.float64, device="cpu")
            for n, p in parameters.items()
        }
        self.sigma_P = torch.cat([s.flatten() for s in spread.values()])
        trained = {n: torch.ones_like(s) for n, s in spread.items()}
        rule.mask(trained)
        self.trained_P = torch.cat([x.flatten() for x in trained.values()])
        bound = rule.bind(parameters, base)
        self.readers = [begin(base, lanes, bound) for _ in range(2 * pairs)]
        """One per particle; particle k + N is the mirror image of particle k."""
        self.xi = torch.zeros(2 * pairs, lanes, len(self.sigma_P), dtype=torch.float64)
        """(2N, B, P): what each lane's weights have felt since theta_0, in units of `sigma_P`."""

    @torch.no_grad()
    def step(
        self, parameters: Parameters, segments: Sequence[Segment], whole: Whole | None = None
    ) -> Estimate:
        """Read one unroll with every particle; `parameters` are not written.

        `whole` is as in `mlm.reading.meta_gradient.meta_gradient`.
        """
        tokens, lanes = whole or whole_of(segments, 0)
        found_P = torch.zeros_like(self.sigma_P)
        nll, flushed = 0.0, 0
        for particle, noise_P in enumerate(self._draw()):
            rule = self._perturbed(parameters, noise_P)
            for t, now in enumerate(self._read(particle, rule, segments)):
                xi_BP, new_B = self.xi[particle], now.new.cpu()
                xi_BP[new_B] = 0
                nll_B = now.scored.nll.double().sum(1).cpu()
                penalty_B = self._penalty(now.before.weights, lanes) / len(segments)
                found_P += (nll_B / tokens + penalty_B) @ xi_BP
                xi_BP[new_B if t else slice(None)] += noise_P
                nll += float(nll_B.sum())
                flushed += int(now.flushed.sum())
        found_P /= len(self.readers) * self.sigma_P
        loss = nll / (len(self.readers) * tokens)
        return Estimate(loss, tokens, _named(found_P, parameters), flushed)

    def _read(self, particle: int, rule: Bound, segments: Sequence[Segment]) -> Iterator[Step]:
        """The steps of one particle, each for use before the next; moves its reader on."""
        for t, segment in enumerate(segments):
            reader = self.readers[particle]
            out = {n: buffers.acquire(tuple(w.shape), w) for n, w in reader.weights.items()}
            now = rollout.step(self.base, rule, reader, segment, out)
            self.readers[particle] = now.after
            yield now
            now.release(reader)
            if t:  # the first weights may be theta_0 itself, or in somebody's hands
                buffers.release(reader.weights.values())

    def _draw(self) -> Tensor:
        """Perturbations in units of `sigma_P`, (2N, P): N of them, then their mirror images."""
        size = len(self.readers) // 2, len(self.sigma_P)
        half = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return torch.cat([half, -half]) * self.trained_P

    def _perturbed(self, parameters: Parameters, noise_P: Tensor) -> Bound:
        """The rule of one particle."""
        eps = _named(self.sigma_P * noise_P, parameters)
        moved = {n: p + eps[n] for n, p in parameters.items()}
        self.rule.project(moved)
        return self.rule.bind(moved, self.base)

    def _penalty(self, weights: Weights, lanes: int) -> Tensor:
        """The EWC penalty of every lane's weights over the number of lanes: (B,)."""
        start, rms = self.base.weights, self.base.rms
        total_B = torch.zeros(self.xi.shape[1], dtype=torch.float64)
        for n in self.base.dynamic if self.ewc else ():
            far = (weights[n] - start[n]) * rms[n]
            total_B += far.square_().flatten(1).sum(1).cpu()
        return total_B * (0.5 * self.ewc / lanes)

    # -- saved and resumed ------------------------------------------------------------------

    def state_tensors(self, lanes: int | None = None) -> dict[str, Tensor]:
        """All that the next step depends on besides parameters and text.

        `lanes` are those of all processes (`mlm.base.processes`), whose tensors the first has.
        """
        lanes = self.xi.shape[1] if lanes is None else lanes
        tensors = {"generator": self.generator.get_state()}
        tensors |= ranks().of_all_lanes({"xi": self.xi.clone()}, lanes, dim=1)
        for particle, reader in enumerate(self.readers):
            own = reader.tensors_of_all(lanes)
            tensors |= {f"{particle}/{name}": t for name, t in own.items()}
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor], lanes: int | None = None) -> None:
        """Continue, bit for bit, where `state_tensors` was taken.

        Raises:
            UserError: they belong to another number of pairs, lanes or parameters.
        """
        lanes = self.xi.shape[1] if lanes is None else lanes
        own, wanted = ranks().share(lanes), (len(self.xi), lanes, self.xi.shape[2])
        if tuple(tensors["xi"].shape) != wanted:
            raise UserError(
                f"the saved particles are {_described(tuple(tensors['xi'].shape))}; here there are "
                f"{_described(wanted)}. Resume with the settings of before, or start anew"
            )
        self.generator.set_state(tensors["generator"].cpu())
        self.xi = tensors["xi"][:, own.start : own.stop].to("cpu", copy=True)
        self.readers = [
            reader.of_share({n: tensors[f"{particle}/{n}"] for n in reader.tensors()}, lanes)
            for particle, reader in enumerate(self.readers)
        ]


def _check(pairs: int, sigma: float, scale: Mapping[str, float], parameters: Parameters) -> None:
    """Refuse settings that say nothing about the parameters; see `Evolution`."""
    if pairs < 1:
        raise UserError(f"evolution strategies need at least one pair of particles, not {pairs}")
    if not sigma > 0:
        raise UserError(f"evolution strategies need a sigma above 0, not {sigma}")
    for name, value in scale.items():
        if name not in parameters:
            raise UserError(
                f"a scale of perturbations is given for {name!r}, but the parameters are "
                f"{', '.join(parameters)}"
            )
        if not value > 0:
            raise UserError(f"the scale of perturbations of {name!r} must be above 0, not {value}")


def _named(values_P: Tensor, parameters: Parameters) -> Parameters:
    """Numbers (P,) in the shapes, dtype and place of the parameters."""
    parts = values_P.split([p.numel() for p in parameters.values()])
    return {
        n: part.view(p.shape).to(p) for part, (n, p) in zip(parts, parameters.items(), strict=True)
    }


def _described(size: tuple[int, ...]) -> str:
    particles, lanes, numbers = size
    return f"{particles // 2} pairs of {lanes} lanes under {numbers} parameters"
