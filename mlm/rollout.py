"""Predict -> score -> update -> carry, and the meta-gradient through it.

One step serves training, evaluation and the Python API. It is strictly causal: a segment is
scored with the weights of before, and only then changes them.
Letters: B lanes, M tokens per segment, T segments of an unroll.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlm.learner import Bound, Parameters, Signal
from mlm.lm import LMState, Weights, initial_state, run_lstm, score, token_nll
from mlm.memory import LongTerm, lanes_of, reset_lanes
from mlm.streams import Segment


class Reader(NamedTuple):
    """Everything that changes while B lanes read: a value, never written in place."""

    weights: Weights
    """Medium-term memory: the dynamic tensors, (B, ...)."""
    state: LMState
    """Short-term memory."""
    age: Tensor
    """(B,) updates since the lane's weights were last theta_0."""

    def select(self, lanes: Tensor) -> Reader:
        """Some of the readers (their indices)."""
        weights = {n: w[lanes] for n, w in self.weights.items()}
        return Reader(weights, self.state.select(lanes), self.age[lanes])


def begin(memory: LongTerm, lanes: int) -> Reader:
    """`lanes` readers that know nothing but the long-term memory."""
    some = memory.weights[memory.dynamic[0]]
    state = initial_state(memory.shape, lanes, some.device, some.dtype)
    age = torch.zeros(lanes, device=some.device, dtype=some.dtype)
    return Reader(lanes_of(memory.start(), lanes), state, age)


def open_articles(memory: LongTerm, reader: Reader, new_B: Tensor) -> Reader:
    """Reset weights, hidden state and age of the lanes that open an article."""
    if not bool(new_B.any()):
        return reader
    weights = reset_lanes(reader.weights, memory.start(), new_B)
    return Reader(weights, reader.state.keep(~new_B), reader.age * ~new_B)


class Scored(NamedTuple):
    """A segment read with the weights of before."""

    nll: Tensor
    """(B, M) nats, zero where the mask is False."""
    loss: Tensor
    """(B,) mean over the lane's tokens, nats per token."""
    gradients: Weights
    """Of (1/M) sum of the lane's nll by its own dynamic weights, (B, ...)."""
    state: LMState


def score_segment(memory: LongTerm, reader: Reader, segment: Segment) -> Scored:
    """Loss and gradient of one segment, every lane under its own weights.

    The gradient is that of sum(nll) / M also where a lane holds fewer than M tokens, so that a
    short end of an article moves the weights by as much as its tokens weigh.
    """
    with torch.enable_grad():
        theta = {n: w.detach().requires_grad_() for n, w in reader.weights.items()}
        full = {**memory.weights, **theta}
        hidden = run_lstm(full, memory.shape, segment.inputs, reader.state)
        nll = token_nll(full, memory.shape, hidden.output, segment.targets) * segment.mask
        total = nll.sum() / segment.inputs.shape[1]
        # A tail of the adaptive softmax that no token of the segment touches has no gradient.
        found = torch.autograd.grad(
            total, list(theta.values()), allow_unused=True, materialize_grads=True
        )
    nll = nll.detach()
    loss = nll.sum(1) / segment.mask.sum(1).clamp(min=1)
    return Scored(nll, loss, dict(zip(theta, found, strict=True)), hidden.state.detach())


@torch.no_grad()
def score_static(memory: LongTerm, state: LMState, segment: Segment) -> tuple[Tensor, LMState]:
    """Loss (B, M) of one segment under theta_0, without a gradient."""
    nll, state = score(memory.weights, memory.shape, segment.inputs, segment.targets, state)
    return nll * segment.mask, state


@torch.no_grad()
def read(
    memory: LongTerm, rule: Bound, reader: Reader, segment: Segment, out: Weights | None = None
) -> tuple[Reader, Tensor]:
    """One step of reading: predict, score, update, carry.

    Lanes flagged `segment.new` are reset first. `out` receives the new weights (for speed; it must
    not be the reader's own).

    Returns:
        the reader after the segment, and the losses (B, M) in nats.
    """
    reader = open_articles(memory, reader, segment.new)
    scored = score_segment(memory, reader, segment)
    weights = rule.update(reader.weights, scored.gradients, Signal(scored.loss, reader.age), out)
    return Reader(weights, scored.state, reader.age + 1), scored.nll


class MetaGradient(NamedTuple):
    """Result of one unroll."""

    loss: float
    """Meta-loss: nats per token over all segments but the first."""
    tokens: int
    """Tokens it averages."""
    gradients: Parameters
    reader: Reader
    """Where the lanes stand afterwards, for the next unroll (truncation with state)."""


class _Past(NamedTuple):
    weights: Weights
    gradients: Weights
    signal: Signal
    new: Tensor


@torch.no_grad()
def meta_gradient(
    memory: LongTerm,
    rule: Bound,
    parameters: Parameters,
    reader: Reader,
    segments: Sequence[Segment],
) -> MetaGradient:
    """First-order meta-gradient of an unroll, without a second backward pass of the LM.

    With gradients as constants for the rule and the hidden state detached between segments, the
    LM gradient that the meta-backward pass needs at theta_t is the inner gradient that reading
    computed anyway:

        lam_t = c gradient_{t+1} + lam_{t+1} d theta_{t+1}/d theta_t
        d phi += lam_t d theta_t/d phi

    c turns the gradient of sum(nll)/M into that of the mean over all tokens of the meta-loss. An
    article border inside the unroll stops lam in its lane.
    """
    past: list[_Past] = []
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for t, segment in enumerate(segments):
        reader = open_articles(memory, reader, segment.new)
        scored = score_segment(memory, reader, segment)
        if t:
            total += scored.nll.sum().double().cpu()
            tokens += int(segment.mask.sum())
        signal = Signal(scored.loss, reader.age)
        past.append(_Past(reader.weights, scored.gradients, signal, segment.new))
        weights = rule.update(reader.weights, scored.gradients, signal)
        reader = Reader(weights, scored.state, reader.age + 1)
    gradients = {n: torch.zeros_like(p) for n, p in parameters.items()}
    if not tokens:
        return MetaGradient(float("nan"), 0, gradients, reader)
    scale = segments[0].inputs.shape[1] / tokens
    lam: Weights | None = None
    for t in reversed(range(len(past) - 1)):
        later, now = past.pop(), past[t]
        lam = _step_back(lam, later, scale)
        lam, part = rule.pullback(now.weights, now.gradients, now.signal, lam)
        for name, value in part.items():
            gradients[name] += value
    return MetaGradient(float(total) / tokens, tokens, gradients, reader)


def _step_back(lam: Weights | None, later: _Past, scale: float) -> Weights:
    """lam at theta_t: the later segment's own gradient plus what flowed back through its update."""
    out = {}
    for name, gradient in later.gradients.items():
        if lam is None:
            out[name] = gradient * scale
        else:
            out[name] = lam[name].add_(gradient, alpha=scale)  # lam is ours: made right here
        if bool(later.new.any()):  # theta_t was dropped for theta_0 there
            out[name][later.new] = 0
    return out
