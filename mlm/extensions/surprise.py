"""Surprise: how much a token teaches grows with its loss.

A learned rule follows the gradient not of the losses l of a segment's tokens but of

    F(l) = (1 - s) l + s l^2 / (2 L)        so that a token weighs F'(l) = 1 - s + s l / L,

with L the text's mean loss (`AdaptationBase.loss`) and s from 0, where every token weighs the same, to 1
(`--adapt.surprise`). What was well predicted has little left to teach; what was not is what an
article brings. The focal loss (Lin et al. 2017) keeps a model in the same way from what it knows
already. (The rule `surprise` is another thing: momentum, after Behrouz et al. 2025, who call the
gradient itself surprise.) The meta-learner's own objective, and every loss that is reported, stays
l.
"""

from __future__ import annotations

from torch import Tensor


def inner_total(nll_BT: Tensor, share_BT: Tensor, slope: Tensor | None) -> Tensor:
    """Sum of share F(l).

    Args:
        slope: (2,), 1 - s and s / L; None = s is 0.
    """
    if slope is None:
        return (nll_BT * share_BT).sum()
    return (nll_BT * share_BT * (slope[0] + slope[1] / 2 * nll_BT)).sum()


def taught_by(nll_BT: Tensor, share_BT: Tensor, slope: Tensor | None) -> Tensor:
    """share F'(l): what each token's gradient weighs."""
    return share_BT if slope is None else share_BT * (slope[0] + slope[1] * nll_BT)
