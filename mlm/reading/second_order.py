"""The exact meta-gradient: through the inner gradients, the signals and the hidden state too.

Slow and with all of the unroll in memory: for small models, and to measure what the first order
leaves out. Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlm.models.base import AdaptationBase
from mlm.models.extension import Outcome, Told
from mlm.models.language_model import State, Weights, own_weights
from mlm.models.recurrence import plain_operations
from mlm.reading.meta_gradient import MetaGradient, Whole, whole_of
from mlm.reading.step import (
    Reader,
    Telling,
    carry_extras,
    exploded_lanes,
    find_restart,
    open_articles,
    open_lanes,
    rested,
)
from mlm.rules.protocol import Parameters, Signal, UpdateRule
from mlm.text.streams import Segment


def second_order(
    base: AdaptationBase,
    rule: UpdateRule,
    parameters: Parameters,
    reader: Reader,
    segments: Sequence[Segment],
    learn: Sequence[str] = (),
    ewc: float = 0.0,
    whole: Whole | None = None,
) -> MetaGradient:
    """`meta_gradient` without its approximations; arguments and result as there.

    Second order as in MAML (Finn et al. 2017): the inner gradients depend on theta, and so do the
    losses that gates see and the hidden state that is carried on. What came before the unroll is a
    constant: the lanes' distance from theta_0, and their hidden state; so is what extensions add.
    """
    with plain_operations(), torch.enable_grad():
        phi = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        weights = {n: base.weights[n].detach().requires_grad_() for n in learn}
        home = dataclasses.replace(base, weights={**base.weights, **weights})
        moved = {
            n: w - base.weights[n] + weights[n] if n in weights else w
            for n, w in reader.weights.items()
        }
        tokens, lanes = whole or whole_of(segments, 1)
        loss, penalty, reader, flushed = _unroll(
            home, rule, phi, reader._replace(weights=moved), segments
        )
        penalty = penalty / (lanes * max(1, len(segments) - 1))
        objective = loss / max(tokens, 1) + 0.5 * ewc * penalty
        inputs = [*phi.values(), *weights.values()]
        found: Sequence[Tensor] = [torch.zeros_like(x) for x in inputs]
        if objective.requires_grad:
            found = torch.autograd.grad(objective, inputs, materialize_grads=True)
    gradients = dict(zip([*phi, *weights], found, strict=True))
    by_weights = {n: gradients.pop(n) for n in weights}
    after = reader._replace(
        weights={n: w.detach() for n, w in reader.weights.items()}, state=reader.state.detach()
    )
    mean = float(loss.detach()) / tokens if tokens else float("nan")
    return MetaGradient(mean, tokens, gradients, by_weights, after, flushed)


def _unroll(
    base: AdaptationBase,
    rule: UpdateRule,
    phi: Parameters,
    reader: Reader,
    segments: Sequence[Segment],
) -> tuple[Tensor, Tensor, Reader, int]:
    """Read all segments in one graph.

    Returns:
        nats of all segments but the first, the sum over lanes and updates of sum F (theta_t -
        theta_0)^2, the reader afterwards, and how often the guard reset a lane.
    """
    start = {**base.start(), **rule.state(base)}
    loss = penalty = torch.zeros_like(reader.age.sum())
    flushed = 0
    for t, segment in enumerate(segments):
        reader = _leaves(open_lanes(base, start, reader, segment)[0])
        taught, begins = segment.mask, segment.new
        now = _inner(base, reader, segment, taught)
        nll = now.nll
        restart, reader = find_restart(base, reader, segment)
        if restart is not None:
            nobody = torch.zeros_like(segment.new)
            reader = _leaves(open_articles(base, start, reader, nobody, restart.lanes))
            taught, begins = restart.taught & taught, begins | restart.lanes
            now = _inner(base, reader, segment, taught)
            nll = torch.where(restart.follows, now.nll, nll)
        if t:
            loss = loss + nll.sum()
            penalty = penalty + _distance(base, reader.weights)
        own = (nll * taught).sum(1) / taught.sum(1).clamp(min=1)
        signal = Signal(own, reader.age)
        theta = rule.formula(phi, base, reader.weights, now.gradients, signal)
        exploded = exploded_lanes(base, segment, taught, own.detach(), reader.age)
        flushed += int(exploded.sum())
        outcome = Outcome(now.by_added, taught)
        extras = carry_extras(base, reader.extras, segment, now.told, outcome)
        guarded = rested(reader, begins, exploded)
        reader = Reader(theta, now.state, reader.age + 1, *guarded, extras)
    return loss, penalty, reader, flushed


def _leaves(reader: Reader) -> Reader:
    """The reader with every tensor a node of its own, by which one can differentiate.

    A rule may hand a tensor on as it is, and earlier hidden states depend on it as well.
    """
    weights = {n: w.view_as(w).requires_grad_(True) for n, w in reader.weights.items()}
    return reader._replace(weights=weights)


class _Inner(NamedTuple):
    """A segment as it was read, all differentiable."""

    nll: Tensor
    """(B, M)."""
    gradients: Weights
    state: State
    told: Told
    """What extensions told the output layer, a constant."""
    by_added: Tensor | None
    """(B, M, E): of the same sum by what they added to the hidden states, a constant."""


def _inner(base: AdaptationBase, reader: Reader, segment: Segment, taught: Tensor) -> _Inner:
    """Read a segment, as `mlm.reading.step.score_segment` does."""
    theta = {n: reader.weights[n] for n in base.dynamic}
    share = taught.to(reader.age.dtype) / segment.inputs.shape[1]
    full = {**base.weights, **theta}
    telling = Telling(base, full, reader.extras, segment)
    now = base.model.read(
        own_weights(full), segment.inputs, segment.targets, reader.state, share, telling
    )
    found = torch.autograd.grad(
        now.total,
        [*theta.values(), *telling.leaves()],
        create_graph=True,
        materialize_grads=True,
    )
    gradients = dict(zip(theta, found, strict=False))
    by_added = found[-1].detach() if telling.leaves() else None
    return _Inner(now.nll * segment.mask, gradients, now.state, telling.told, by_added)


def _distance(base: AdaptationBase, weights: Weights) -> Tensor:
    """sum F (theta - theta_0)^2 over all lanes and weights."""
    squares = [(base.rms[n] * (weights[n] - base.weights[n])).square().sum() for n in base.dynamic]
    return torch.stack(squares).sum()
