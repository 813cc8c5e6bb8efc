"""Learned basis: through which directions a matrix of full rank is read and rewritten.

    output = T L (P x),   L = theta_0 + D,   T = I + Q Q^T (`mlm.extensions.word_coupling`) or I

L (O, I) is a lane's own, P (I, I) and Q (O, S) are shared. A gradient step on L moves the outputs
at x' by T T^T g (x . P^T P x'): P says which inputs are alike, T which outputs go together. Both
can be learned: D is kept while P and Q move, and theta_0's L follows them,

    L_0 = T^-1 W P^-1,

so that the static model never changes. Their gradient is that of the loss of reading by P and Q
where an update rule, here RMS, has led, not through its updates: warped gradient descent
(Flennerhag et al. 2020, section 3). P moves as R P_0, where P_0 are the principal directions, R
from the identity.

Letters: O outputs, I inputs, S directions of Q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.progress import NOTHING_KEPT, Progress, adam_tensors, load_adam
from mlm.extensions.learning import Course, learn_by_reading
from mlm.extensions.word_coupling import COUPLING, uncoupled
from mlm.models.base import AdaptationBase, fold_low_rank
from mlm.models.extension import Extension, Extent, Making, Need, Plan
from mlm.models.language_model import Weights
from mlm.models.low_rank import BASIS, LOW, base_of
from mlm.reading.step import begin, prepared, step
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import as_parameters
from mlm.text.streams import MixedLanes, Segment, Text

TURN = ".turn"
"""Ending of R's name."""
LANES = 16
TOKENS = 64
"""Of every lane, between two steps: so many, or one segment."""
PEAK = 4e-4
"""Of Adam's rate; cosine to zero."""
SETTING = {"rate": 1.5e-3, "decay": 5e-3}
"""Of RMS, under which the text is read, at 32 tokens per segment."""


@dataclass(frozen=True)
class LearnedBasis(Extension):
    """Bases of matrices, and the coupling, learned from held-out text while RMS reads it."""

    words: int = 0
    """Held-out training words from which the bases of `.low` at full rank, and how words are
    coupled, are learned while reading, with the same static model; 0 = principal directions."""
    name: ClassVar[str] = "learned_basis"
    makes_base: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.words > 0

    def problems(self, plan: Plan) -> Sequence[str]:
        """There must be a basis, and theta_0 must stay."""
        found = []
        if plan.folded == ():
            found.append(
                "--learned-basis.words needs a matrix that adapts in a basis of its own: name "
                "softmax.low or lstm.*.input.low in --dynamic, with a --rank of all its "
                "inputs"
            )
        if plan.learn != ("rule",):
            found.append("--learned-basis.words goes with --meta.learn rule only")
        return found

    def making(self, text: Extent, corpus: Extent) -> Need:
        """Lanes that read, each with the gradient and the weights before and after it."""
        tokens = min(text.text, self.words * text.tokens_per_word)
        return Need(4 * 4 * LANES * text.weights, tokens)

    def make(self, base: AdaptationBase, making: Making) -> AdaptationBase:
        """With bases learned from the held-out articles."""
        base = fold_low_rank(base)
        return learn_bases(base, making.text, self.words, making.quiet, making.progress)


def folded_matrices(base: AdaptationBase) -> list[str]:
    """Names of the matrices that adapt in a basis of their own."""
    return [name.removesuffix(BASIS) for name in base.weights if name.endswith(BASIS)]


def basis_parameters(base: AdaptationBase) -> Weights:
    """What is learned: R of every such matrix, and Q where words are coupled."""
    found = {}
    for name in folded_matrices(base):
        basis = base.weights[name + BASIS]
        found[name + TURN] = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    if COUPLING in base.weights:
        found[COUPLING] = base.weights[COUPLING].clone()
    return found


def _theta_0(matrix_OI: Tensor, basis: Tensor, coupling: Tensor | None) -> Tensor:
    """L_0 = T^-1 W P^-1."""
    start = torch.linalg.solve(basis.t(), matrix_OI.t()).t()
    return (start if coupling is None else uncoupled(start, coupling)).contiguous()


def with_bases(base: AdaptationBase, parameters: Mapping[str, Tensor]) -> AdaptationBase:
    """The long-term memory with these R and Q; the same static model.

    `base` holds P_0: one whose bases have not been learned.
    """
    moved: Weights = {}
    for name in folded_matrices(base):
        basis = parameters[name + TURN] @ base.weights[name + BASIS]
        coupling = parameters.get(COUPLING) if name == "softmax" else None
        moved[name + BASIS] = basis
        if coupling is not None:
            moved[COUPLING] = coupling.clone()
        moved[name + LOW] = _theta_0(base.weights[base_of(name)], basis, coupling)
    return base.with_weights(moved)


@torch.no_grad()
def follow_weights(base: AdaptationBase, weights: Mapping[str, Tensor]) -> AdaptationBase:
    """The long-term memory of another language model, in the same bases: theta_0 is `weights`, by
    its plain names, and L_0 = T^-1 W P^-1 with them; the Fisher and all else stay. What extensions
    learned with that model comes along.

    Raises:
        KeyError: a weight of the memory's model is not among them.
    """
    names = (*base.static, *(n for n in weights if "/" in n))
    moved = {n: weights[n].detach() for n in names}
    for name in folded_matrices(base):
        coupling = base.weights.get(COUPLING) if name == "softmax" else None
        moved[name + LOW] = _theta_0(moved[base_of(name)], base.weights[name + BASIS], coupling)
    return base.with_weights(moved)


def read_by(base: AdaptationBase) -> tuple[str, ...]:
    """The weights by which the loss is to be differentiated for `basis_gradients`."""
    names = [name + ending for name in folded_matrices(base) for ending in (BASIS, LOW)]
    return (*names, COUPLING) if COUPLING in base.weights else tuple(names)


def basis_gradients(
    base: AdaptationBase, first: AdaptationBase, gradients: Mapping[str, Tensor]
) -> Weights:
    """Gradients by R and Q, L_0 following them.

    Args:
        base: with the P and Q that were read with; first: with P_0.
        gradients: by `read_by`, each with the others held; of L the sum over lanes.
    """
    found: Weights = {}
    for name in folded_matrices(base):
        basis, low = base.weights[name + BASIS], base.weights[name + LOW]
        of_low = gradients[name + LOW]
        follows = torch.linalg.solve(basis, (low.t() @ of_low).t()).t()  # L_0^T G P^-T
        of_basis = gradients[name + BASIS] - follows
        found[name + TURN] = of_basis @ first.weights[name + BASIS].t()
        if name == "softmax" and COUPLING in base.weights:
            q_OS = base.weights[COUPLING]
            # L_0 moves by -T^-1 (dQ Q^T + Q dQ^T) L_0
            straight = uncoupled(of_low, q_OS)
            pull = straight @ (low.t() @ q_OS) + low @ (straight.t() @ q_OS)
            found[COUPLING] = gradients[COUPLING] - pull
    return found


class BasisTrainer:
    """R and Q while they are learned, and the lanes that read."""

    def __init__(self, base: AdaptationBase, lanes: int) -> None:
        self.first = self.base = base
        self.parameters = basis_parameters(base)
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), betas=(0.9, 0.99))
        # the mean of more tokens' gradients is smaller, and so is the Fisher's noise
        rate = SETTING["rate"] * math.sqrt(base.segment / 32)
        self.setting = as_parameters({**SETTING, "rate": rate}, base)
        self.rule = RMS().bind(self.setting, base)
        self.reader = begin(base, lanes, self.rule)

    def learn(self, segments: Sequence[Segment], rate: float) -> float:
        """Read on, then one step of Adam; returns the nats of the segments."""
        wanted, total = read_by(self.base), 0.0
        sums = {name: torch.zeros_like(self.base.weights[name]) for name in wanted}
        base = prepared(self.base, self.rule)
        for segment in segments:
            now = step(base, self.rule, self.reader, segment, learn=wanted)
            for name, value in sums.items():
                value += now.scored.of_all_lanes(name)
            now.release(self.reader)
            self.reader = now.after
            total += float(now.scored.nll.sum())
        for name, gradient in basis_gradients(self.base, self.first, sums).items():
            self.parameters[name].grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._move()
        return total

    def learned(self) -> list[Tensor]:
        """R and Q."""
        return list(self.parameters.values())

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the place in the text."""
        found = {f"parameters/{n}": p for n, p in self.parameters.items()}
        found |= {f"reader/{n}": t for n, t in self.reader.tensors().items()}
        return found | adam_tensors(self.optimizer, self.parameters)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`; at least one step was taken."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameters/{name}"])
        load_adam(self.optimizer, self.parameters, tensors)
        self.reader = self.reader.of({n: tensors[f"reader/{n}"] for n in self.reader.tensors()})
        self.base = with_bases(self.first, self.parameters)
        self.rule = RMS().bind(self.setting, self.base)

    def _move(self) -> None:
        """The lanes keep what they have learned."""
        before, self.base = self.base, with_bases(self.first, self.parameters)
        for name in folded_matrices(self.base):
            low = name + LOW
            self.reader.weights[low].add_(self.base.weights[low] - before.weights[low])
        self.rule = RMS().bind(self.setting, self.base)


def _diverged(tokens: int, nats: float) -> UserError:
    return UserError(
        f"--learned-basis.words: after {tokens:,} tokens the loss is {nats} nats; the "
        "language model's loss is NaN, train it again"
    )


@torch.no_grad()
def learn_bases(
    base: AdaptationBase,
    text: Text,
    words: int,
    quiet: bool = True,
    progress: Progress = NOTHING_KEPT,
) -> AdaptationBase:
    """The long-term memory with bases learned from `words` words of `text`, or all it has.

    Half of the lanes read article by article, the others one text each.

    Args:
        base: `mlm.models.base.fold_low_rank`; its Fisher stays as it is.
        progress: where it is kept how far learning has come.

    Raises:
        ValueError: no matrix adapts in a basis of its own.
        UserError: the loss is not finite.
    """
    if not folded_matrices(base):
        raise ValueError("no matrix adapts in a basis of its own")
    lanes = MixedLanes(text, LANES, 0.5, base.segment, 0)
    bases = BasisTrainer(base, LANES)
    course = Course(
        LearnedBasis.name,
        "bases",
        min(text.tokens, int(words * text.tokens_per_word)),
        max(1, TOKENS // base.segment),
        PEAK,
        _diverged,
    )
    learn_by_reading(bases, lanes, course, quiet, progress)
    return bases.base
