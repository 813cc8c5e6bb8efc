"""Predict -> score -> update -> carry, and the meta-gradient through it.

One step serves training, evaluation and the Python API. It is strictly causal: a segment is
scored with the weights of before, and only then changes them.
Letters: B lanes, M tokens per segment, T segments of an unroll.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mlm import buffers
from mlm.forward import forget_lanes
from mlm.learner import Bound, Parameters, Signal
from mlm.lm import LMState, Weights, initial_state, run_lstm, score, weighted_nll
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
        share = segment.mask.to(hidden.output.dtype) / segment.inputs.shape[1]
        nll, total = weighted_nll(full, memory.shape, hidden.output, segment.targets, share)
        # A tail of the adaptive softmax that no token of the segment touches has no gradient.
        found = torch.autograd.grad(
            total, list(theta.values()), allow_unused=True, materialize_grads=True
        )
    nll = nll * segment.mask
    loss = nll.sum(1) / segment.mask.sum(1).clamp(min=1)
    return Scored(nll, loss, dict(zip(theta, found, strict=True)), hidden.state.detach())


@torch.no_grad()
def score_static(memory: LongTerm, state: LMState, segment: Segment) -> tuple[Tensor, LMState]:
    """Loss (B, M) of one segment under theta_0, without a gradient."""
    nll, state = score(memory.static, memory.shape, segment.inputs, segment.targets, state)
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
    buffers.give(scored.gradients.values())
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


GradientMode = Literal["reverse", "checkpoint", "forward"]
"""How `meta_gradient` computes; T updates hold so many copies of the lanes' dynamic weights:
reverse about 2 T, checkpoint about 2 sqrt(2 T), forward those of the rule's tangent whatever T."""


class _Past(NamedTuple):
    """What the way back, or forward mode, needs of one update."""

    weights: Weights
    gradients: Weights
    signal: Signal
    new: Tensor


class _Loss:
    """Meta-loss of an unroll while it is read."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.tokens = sum(int(segment.mask.sum()) for segment in segments[1:])
        self.total = torch.zeros((), dtype=torch.float64)
        self.scale = segments[0].inputs.shape[1] / max(self.tokens, 1)
        """c: from the gradient of sum(nll) / M to that of the mean over all tokens."""

    def add(self, t: int, nll_BM: Tensor) -> None:
        """Count segment `t`; the first is only read."""
        if t:
            self.total += nll_BM.sum().double().cpu()

    def mean(self) -> float:
        """Nats per token, nan without a token."""
        return float(self.total) / self.tokens if self.tokens else float("nan")


@torch.no_grad()
def meta_gradient(
    memory: LongTerm,
    rule: Bound,
    parameters: Parameters,
    reader: Reader,
    segments: Sequence[Segment],
    mode: GradientMode = "reverse",
) -> MetaGradient:
    """First-order meta-gradient of an unroll, without a second backward pass of the LM.

    With gradients as constants for the rule and the hidden state detached between segments, the
    LM gradient that the meta-backward pass needs at theta_t is the inner gradient that reading
    computed anyway. Back through the updates (`reverse`, and `checkpoint`, which keeps a reader
    now and then and reads the segments between two of them again):

        lam_t = c gradient_{t+1} + lam_{t+1} d theta_{t+1}/d theta_t
        d phi += lam_t d theta_t/d phi

    or along with them (`forward`):

        S_t = d theta_t/d theta_{t-1} S_{t-1} + d theta_t/d phi
        d phi += c <S_t, gradient_{t+1}>

    c turns the gradient of sum(nll)/M into that of the mean over all tokens of the meta-loss. An
    article border inside the unroll stops lam, or zeroes S, in its lane.
    """
    loss, found = _Loss(segments), {n: torch.zeros_like(p) for n, p in parameters.items()}
    if mode == "forward":
        reader = _forward(memory, rule, reader, segments, loss, found)
    else:
        spacing = len(segments) if mode == "reverse" else snapshot_spacing(len(segments))
        reader = _reverse(memory, rule, reader, segments, loss, found, spacing)
    return MetaGradient(loss.mean(), loss.tokens, found, reader)


def snapshot_spacing(updates: int) -> int:
    """Updates between two snapshots: ceil(sqrt(T/2)).

    T/s snapshots of the weights, and weights and gradients of s updates, are fewest there.
    """
    return math.ceil(math.sqrt(updates / 2))


def _step(
    memory: LongTerm, rule: Bound, reader: Reader, segment: Segment
) -> tuple[_Past, Reader, Tensor]:
    """One update: what it was made of, the reader after it, the losses (B, M)."""
    reader = open_articles(memory, reader, segment.new)
    scored = score_segment(memory, reader, segment)
    signal = Signal(scored.loss, reader.age)
    out = {n: buffers.take(tuple(w.shape), w) for n, w in reader.weights.items()}
    weights = rule.update(reader.weights, scored.gradients, signal, out)
    past = _Past(reader.weights, scored.gradients, signal, segment.new)
    return past, Reader(weights, scored.state, reader.age + 1), scored.nll


def _forward(
    memory: LongTerm,
    rule: Bound,
    reader: Reader,
    segments: Sequence[Segment],
    loss: _Loss,
    found: Parameters,
) -> Reader:
    """Read all segments with the tangent beside the weights; fills `found`."""
    tangent = rule.tangent(len(reader.age))
    for t, segment in enumerate(segments):
        forget_lanes(tangent, segment.new)
        now, reader, nll = _step(memory, rule, reader, segment)
        loss.add(t, nll)
        rule.advance(now.weights, now.gradients, now.signal, tangent, found)
        buffers.give(now.gradients.values())
        if t:  # the first weights are the caller's
            buffers.give(now.weights.values())
        del now  # two copies of the weights less during the next step
    for value in found.values():
        value *= loss.scale
    return reader


def _reverse(
    memory: LongTerm,
    rule: Bound,
    reader: Reader,
    segments: Sequence[Segment],
    loss: _Loss,
    found: Parameters,
    spacing: int,
) -> Reader:
    """Read all segments, then walk back; fills `found`.

    The updates of the last `spacing` segments are walked back as they were read; those before are
    read again, `spacing` at a time, each time from the snapshot at their start: the same numbers.
    """
    snapshots: list[Reader] = []
    past: list[_Past] = []
    for t, segment in enumerate(segments):
        if t % spacing == 0:
            snapshots.append(reader)
            _forget(past)
        now, reader, nll = _step(memory, rule, reader, segment)
        loss.add(t, nll)
        past.append(now)
        del now
    lam: Weights | None = None
    for first in reversed(range(0, len(segments), spacing)):
        again = snapshots.pop()
        for segment in segments[first : first + spacing] if not past else ():
            now, again, _ = _step(memory, rule, again, segment)
            past.append(now)
            del now
        lam = _walk_back(rule, past, lam, loss.scale, found)
    return reader


def _forget(past: list[_Past]) -> None:
    """Empty `past`: its memory serves the next updates. The oldest weights are a snapshot's."""
    for k, now in enumerate(past):
        buffers.give(now.gradients.values())
        if k:
            buffers.give(now.weights.values())
    past.clear()


def _walk_back(
    rule: Bound, past: list[_Past], lam: Weights | None, scale: float, found: Parameters
) -> Weights | None:
    """lam at theta_t before the oldest of `past` (emptied) from lam after the newest."""
    while past:
        now = past.pop()
        if lam is None:
            lam = {name: gradient * scale for name, gradient in now.gradients.items()}
        else:
            lam, part = rule.pullback(now.weights, now.gradients, now.signal, lam, scale)
            for name, value in part.items():
                found[name] += value
        if bool(now.new.any()):  # theta_{t-1} was dropped for theta_0 there
            for value in lam.values():
                value[now.new] = 0
        buffers.give(now.gradients.values())
        if past:  # the oldest weights are the caller's, or a snapshot's
            buffers.give(now.weights.values())
    return lam
