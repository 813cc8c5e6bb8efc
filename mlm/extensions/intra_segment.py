"""Intra-segment adaptation: the output layer predicts with what the segment's words have taught.

Weights change after every segment, so a word that comes again within it would be as unexpected as
before. With e_s the gradient of the segment's loss by the logits at its word s, and the keys
k_s = P h_s, an output layer T L (P h) + b (`mlm.extensions.word_coupling`; T = I without coupling)
predicts by

    logits_t - a * T^2 sum_{s<t} e_s (k_s . (c * k_t) + d),

never with words it has not read. Were a_v c_j the rule's step size at L's weight (v, j), and a the
same for coupled words (then T a T = a T^2, which costs less and gained as much), that is what its
step at every word would do, all gradients taken at the weights of the segment's start: the dual
form of mini-batch test-time training (Sun et al. 2024, section 2.5), a linear attention within the
segment (fast weights: Schmidhuber 1992; Ba et al. 2016). d stands for the bias. a, c and d are the
nearest to the rule's steps (`IntraSegment.prepare`); fitted to held-out text they gained no more.
The loss of the segment, and its gradient by which all weights change after it, are those of these
predictions, what is subtracted being a constant: words that were learned already teach less. The
maths is in `mlm.models.output_layer`. The static model and hand-made rules never read so.

Letters: I inputs of the output layer in its basis, V vocabulary, S directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlm.extensions.word_coupling import COUPLING, output_layer_problem
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Extent, Plan, Told
from mlm.models.language_model import Weights, WithinSegment
from mlm.models.low_rank import LOW
from mlm.reading.step import begin
from mlm.rules.gates import LinearGates
from mlm.rules.protocol import Bound, Signal
from mlm.text.streams import Segment

SETTLED = 20
"""Segments a lane has read when it learns as it mostly does."""
OUTPUT = ("softmax" + LOW, "softmax.bias")
SMALLEST_STEP = 1e-9
"""Of a step size, before its logarithm."""
ROWS, COLUMNS, SQUARE = "rows", "columns", "square"
"""Names of a, of c with d, and of R (`WithinSegment`)."""


def squared(coupling_VS: Tensor) -> Tensor:
    """R (V, S) for which T^2 = I + R Q^T."""
    inner = coupling_VS.t() @ coupling_VS
    eye = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return coupling_VS @ inner.add_(eye * 2)


@dataclass(frozen=True)
class IntraSegment(Extension):
    """Between two updates the output layer learns from the words so far."""

    on: bool = False
    """Between two updates the output layer predicts with what the words so far teach it: learned
    rules gain, most with long segments. It needs `softmax.low` at full rank."""
    name: ClassVar[str] = "intra_segment"

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.on

    def applies_to(self, rule: Any) -> bool:
        """Learned rules; hand-made ones read as they were published."""
        return isinstance(rule, LinearGates)

    def problems(self, plan: Plan) -> Sequence[str]:
        """It needs an output layer in a basis of its own, and first-order meta-gradients."""
        found = output_layer_problem("--intra-segment.on", plan)
        if plan.gradient in ("second", "pes"):
            found += [
                f"--meta.gradient is {plan.gradient}; --intra-segment.on goes with reverse, "
                "checkpoint or forward"
            ]
        return found

    def lane_bytes(self, extent: Extent) -> float:
        """Logits before and after words taught, and what they lose."""
        return 2.0 * extent.logits

    def prepare(self, base: AdaptationBase, bound: Bound) -> Weights:
        """The a, c and d nearest to the rule's steps.

        a_v c_j comes nearest, in the mean of logarithms, to how far the rule moves weight (v, j) of
        the output layer per unit of its gradient, in a lane whose loss is the text's mean and which
        has read `SETTLED` segments; a_v d to that of the bias.
        """
        reader = begin(base, 1, bound)
        signal = Signal(
            torch.full_like(reader.age, base.loss), torch.full_like(reader.age, SETTLED)
        )
        still, moved = (
            bound.update(
                reader.weights,
                {n: torch.full_like(reader.weights[n], g) for n in base.dynamic},
                signal,
            )
            for g in (0.0, 1.0)
        )
        logs = {
            n: (still[n] - moved[n])[0].clamp(min=SMALLEST_STEP).log()
            for n in base.dynamic
            if n in OUTPUT
        }
        rows_V = logs[OUTPUT[0]].mean(1)
        columns_I = logs[OUTPUT[0]].mean(0) - rows_V.mean()
        bias = (logs[OUTPUT[1]] - rows_V).mean() if OUTPUT[1] in logs else math.log(SMALLEST_STEP)
        own = torch.cat([columns_I, columns_I.new_tensor([float(bias)])])
        found = {self.key(ROWS): rows_V.exp(), self.key(COLUMNS): own.exp()}
        if COUPLING in base.weights:
            found[self.key(SQUARE)] = squared(base.weights[COUPLING])
        return found

    def before(
        self, weights: Weights, value: Any, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        """What words teach those behind them."""
        within = WithinSegment(
            weights[self.key(ROWS)], weights[self.key(COLUMNS)], weights.get(self.key(SQUARE))
        )
        return told._replace(terms=told.terms._replace(within=within))
