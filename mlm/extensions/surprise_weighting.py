"""Surprise weighting: how much a token teaches grows with its loss.

A learned rule follows the gradient not of the losses l of a segment's tokens but of

    F(l) = (1 - s) l + s l^2 / (2 L)        so that a token weighs F'(l) = 1 - s + s l / L,

with L the text's mean loss (`AdaptationBase.loss`) and s from 0, where every token weighs the same,
to 1. What was well predicted has little left to teach; what was not is what an article brings. The
focal loss (Lin et al. 2017) keeps a model in the same way from what it knows already. (The rule
`surprise` is another thing: momentum, after Behrouz et al. 2025, who call the gradient itself
surprise.) The meta-learner's own objective, and every loss that is reported, stays l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Plan, Told
from mlm.models.language_model import Weights
from mlm.rules.gates import LinearGates
from mlm.text.streams import Segment


@dataclass(frozen=True)
class SurpriseWeighting(Extension):
    """Tokens teach learned rules the more, the less they were expected."""

    share: float = 0.0
    """s, 0 to 1: how much a token's weight in the gradient follows its loss; 0 = not at all."""
    name: ClassVar[str] = "surprise_weighting"
    reweights: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.share > 0

    def applies_to(self, rule: Any) -> bool:
        """Learned rules; hand-made ones read as they were published."""
        return isinstance(rule, LinearGates)

    def derived(self, base: AdaptationBase) -> Weights:
        """1 - s and s / L."""
        some = base.weights[base.dynamic[0]]
        slope = some.new_tensor([1 - self.share, self.share / base.loss])
        return {self.key("slope"): slope}

    def before(
        self, weights: Weights, value: Any, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        """How tokens weigh, in the gradient and within the segment."""
        slope, within = weights[self.key("slope")], told.terms.within
        within = within if within is None else within._replace(slope=slope)
        return told._replace(terms=told.terms._replace(slope=slope, within=within))

    def problems(self, plan: Plan) -> Sequence[str]:
        """The share must be one."""
        if 0 <= self.share <= 1:
            return ()
        return (f"--surprise-weighting.share is {self.share}; it must be in [0, 1]",)
