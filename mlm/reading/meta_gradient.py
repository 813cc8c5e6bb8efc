"""The first-order meta-gradient of an unroll, in three ways that agree.

Letters: B lanes, M tokens per segment, T segments of an unroll.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.reading.step import Reader, Scored, Step, score_segment, step
from mlm.rules.forward import forget_lanes
from mlm.rules.protocol import Bound, Parameters, Signal
from mlm.text.streams import Segment


class MetaGradient(NamedTuple):
    """Result of one unroll."""

    loss: float
    """Meta-loss: nats per token over all segments but the first."""
    tokens: int
    """Tokens it averages."""
    gradients: Parameters
    """By the rule's parameters."""
    weights: Weights
    """By the language model's weights that were asked for."""
    reader: Reader
    """Where the lanes stand afterwards, for the next unroll (truncation with state)."""
    flushed: int
    """How often the guard reset a lane."""


class Whole(NamedTuple):
    """What an unroll is a part of, where each of several processes reads some of the lanes."""

    tokens: int
    """Of all lanes, in the segments whose loss counts."""
    lanes: int


GradientMode = Literal["reverse", "checkpoint", "forward"]
"""How `meta_gradient` computes; T updates hold so many copies of the lanes' dynamic weights:
reverse about 2 T, checkpoint about 2 sqrt(2 T), forward those of the rule's tangent whatever T."""


class _Past(NamedTuple):
    """What the way back, or forward mode, needs of one update."""

    weights: Weights
    gradients: Weights
    objective: Weights
    """The meta-loss's gradient by `weights`: `gradients`, unless an extension weighs tokens."""
    signal: Signal
    new: Tensor


def whole_of(segments: Sequence[Segment], first: int) -> Whole:
    """What these segments are where they are all there is; the loss of those from `first` on
    counts."""
    tokens = sum(int(segment.mask.sum()) for segment in segments[first:])
    return Whole(tokens, len(segments[0].new))


class _Unroll:
    """An unroll: what it is made of, and what is summed up while it is read."""

    def __init__(
        self,
        base: AdaptationBase,
        rule: Bound,
        segments: Sequence[Segment],
        learn: Sequence[str],
        ewc: float,
        whole: Whole | None,
    ) -> None:
        self.base, self.rule, self.segments, self.learn = base, rule, segments, learn
        self.tokens, lanes = whole or whole_of(segments, 1)
        self.total = torch.zeros((), dtype=torch.float64)
        self.flushed = 0
        self.scale = segments[0].inputs.shape[1] / max(self.tokens, 1)
        """c: from the gradient of sum(nll) / M to that of the mean over all tokens."""
        self.pull = ewc / (lanes * max(1, len(segments) - 1))
        """Of the penalty: its strength for one lane of one update."""
        self.weights = {n: torch.zeros_like(base.weights[n]) for n in learn}

    def read(
        self,
        t: int,
        segment: Segment,
        reader: Reader,
        again: bool = False,
        walked: bool = True,
    ) -> tuple[_Past, Reader]:
        """Segment `t`: one update and the reader after it; `again` counts nothing.

        What is not `walked` back has no `objective` of its own: nobody asks for it.
        """
        learn = () if again or not t else self.learn
        out = {n: buffers.acquire(tuple(w.shape), w) for n, w in reader.weights.items()}
        now = step(self.base, self.rule, reader, segment, out, learn)
        objective = now.scored
        if self.base.reweights and (walked or learn):
            objective = score_segment(self.base, now.before, segment, learn, now.taught, plain=True)
        if not again:
            self._count(t, now, objective)
        gradients = now.scored.gradients, objective.gradients
        return _Past(now.before.weights, *gradients, now.signal, now.new), now.after

    def _count(self, t: int, now: Step, objective: Scored) -> None:
        """Add the segment to the meta-loss; the first is only read."""
        self.flushed += int(now.flushed.sum())
        if not t:
            return
        self.total += now.scored.nll.sum().double().cpu()
        for name, value in self.weights.items():
            value += objective.of_all_lanes(name)

    def penalty(self, weights: Weights) -> Weights:
        """Gradient of the EWC penalty by the lanes' weights, (B, ...)."""
        start, rms = self.base.weights, self.base.rms
        return {
            n: (weights[n] - start[n]).mul_(rms[n].square().mul_(self.pull))
            for n in self.base.dynamic
        }

    def result(self, found: Parameters, reader: Reader) -> MetaGradient:
        """What `meta_gradient` returns."""
        loss = float(self.total) / self.tokens if self.tokens else float("nan")
        weights = {n: w.mul_(self.scale) for n, w in self.weights.items()}
        return MetaGradient(loss, self.tokens, found, weights, reader, self.flushed)


@torch.no_grad()
def meta_gradient(
    base: AdaptationBase,
    rule: Bound,
    parameters: Parameters,
    reader: Reader,
    segments: Sequence[Segment],
    mode: GradientMode = "reverse",
    learn: Sequence[str] = (),
    ewc: float = 0.0,
    whole: Whole | None = None,
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
    article border inside the unroll stops lam, or zeroes S, in its lane. Where an extension weighs
    tokens, the inner gradient is not the meta-loss's, and every segment is scored twice.

    `learn` names weights of the language model to train through the adaptation. A rule moves a
    lane by what its gradients say, and back towards theta_0 in proportion to the distance (f = 1 -
    z): moving theta_0 moves every theta_t along. To first order the gradient by theta_0 therefore
    is the sum over lanes and updates of the inner gradients, as it is for weights that all lanes
    share.

    `ewc` adds the penalty (ewc/2) mean over lanes and updates of sum F (theta_t - theta_0)^2 to
    the objective (Kirkpatrick et al. 2017, eq. 3; F = rms^2), not to the `loss` that is returned.

    With `whole`, these lanes are some of those that several processes read, and loss and gradients
    are their share of a sum over processes.
    """
    unroll = _Unroll(base, rule, segments, learn, ewc, whole)
    found = {n: torch.zeros_like(p) for n, p in parameters.items()}
    if mode == "forward":
        reader = _forward(unroll, reader, found)
    else:
        spacing = len(segments) if mode == "reverse" else snapshot_spacing(len(segments))
        reader = _reverse(unroll, reader, found, spacing)
    return unroll.result(found, reader)


def snapshot_spacing(updates: int) -> int:
    """Updates between two snapshots: ceil(sqrt(T/2)).

    T/s snapshots of the weights, and weights and gradients of s updates, are fewest there.
    """
    return math.ceil(math.sqrt(updates / 2))


def _recycle(now: _Past, weights: bool) -> None:
    """What an update was made of is memory for the next ones."""
    buffers.release(now.gradients.values())
    if now.objective is not now.gradients:
        buffers.release(now.objective.values())
    if weights:
        buffers.release(now.weights.values())


def _forward(unroll: _Unroll, reader: Reader, found: Parameters) -> Reader:
    """Read all segments with the tangent beside the weights; fills `found`."""
    rule, tangent = unroll.rule, unroll.rule.tangent(len(reader.age))
    penalty, unused = ({n: torch.zeros_like(p) for n, p in found.items()} for _ in range(2))
    for t, segment in enumerate(unroll.segments):
        now, reader = unroll.read(t, segment, reader)
        forget_lanes(tangent, now.new)
        if unroll.pull:
            rule.owed(tangent, unroll.penalty(now.weights), now.signal, penalty)
        if now.objective is now.gradients:
            rule.advance(now.weights, now.gradients, now.signal, tangent, found)
        else:
            rule.owed(tangent, now.objective, now.signal, found)
            rule.advance(now.weights, now.gradients, now.signal, tangent, unused)
        _recycle(now, weights=t > 0)  # the first weights are the caller's
        del now  # two copies of the weights less during the next step
    for name, value in found.items():
        value.mul_(unroll.scale).add_(penalty[name])
    return reader


def _reverse(unroll: _Unroll, reader: Reader, found: Parameters, spacing: int) -> Reader:
    """Read all segments, then walk back; fills `found`.

    The updates of the last `spacing` segments are walked back as they were read; those before are
    read again, `spacing` at a time, each time from the snapshot at their start: the same numbers.
    """
    snapshots: list[Reader] = []
    past: list[_Past] = []
    last = (len(unroll.segments) - 1) // spacing * spacing
    for t, segment in enumerate(unroll.segments):
        if t % spacing == 0:
            snapshots.append(reader)
            _forget(past)
        now, reader = unroll.read(t, segment, reader, walked=t >= last)
        past.append(now)
        del now
    lam: Weights | None = None
    for first in reversed(range(0, len(unroll.segments), spacing)):
        again = snapshots.pop()
        some = unroll.segments[first : first + spacing] if not past else ()
        for t, segment in enumerate(some, first):
            now, again = unroll.read(t, segment, again, again=True)
            past.append(now)
            del now
        lam = _walk_back(unroll, past, lam, found)
    return reader


def _forget(past: list[_Past]) -> None:
    """Empty `past`: its memory serves the next updates. The oldest weights are a snapshot's."""
    for k, now in enumerate(past):
        _recycle(now, weights=k > 0)
    past.clear()


def _walk_back(
    unroll: _Unroll, past: list[_Past], lam: Weights | None, found: Parameters
) -> Weights | None:
    """lam at theta_t before the oldest of `past` (emptied) from lam after the newest."""
    rule, scale = unroll.rule, unroll.scale
    while past:
        now = past.pop()
        if lam is None:
            lam = {
                n: now.objective[n] * scale if n in now.objective else torch.zeros_like(w)
                for n, w in now.weights.items()
            }
        else:
            own = scale if now.objective is now.gradients else 0.0
            lam, part = rule.pullback(now.weights, now.gradients, now.signal, lam, own)
            for name, value in part.items():
                found[name] += value
            if now.objective is not now.gradients:
                for name, value in now.objective.items():
                    lam[name].add_(value, alpha=scale)
        if unroll.pull:
            for name, value in unroll.penalty(now.weights).items():
                lam[name] = lam[name] + value
        if bool(now.new.any()):  # theta_{t-1} was dropped for theta_0 there
            for value in lam.values():
                value[now.new] = 0
        _recycle(now, weights=bool(past))  # the oldest are the caller's, or a snapshot's
    return lam
