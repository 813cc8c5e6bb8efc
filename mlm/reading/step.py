"""Predict -> score -> update -> carry, and the meta-gradient through it.

One step serves training, evaluation and the Python API. It is strictly causal: a segment is
scored with the weights of before, and only then changes them.
Letters: B lanes, M tokens per segment, T segments of an unroll.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlm.extensions import at_once
from mlm.extensions.phrases import AGAIN, SAID, Heard, History, Phrases, Recalled
from mlm.kernels import buffers
from mlm.models.base import COLUMNS, RELATED, ROWS, TWICE, AdaptationBase, lanes_of, reset_lanes
from mlm.models.language_model import State, Weights
from mlm.models.low_rank import LOW
from mlm.rules.protocol import Bound, Signal
from mlm.text.streams import Segment

SETTLED = 20
"""Segments a lane has read when it learns as it mostly does."""


OUTPUT = ("softmax" + LOW, "softmax.bias")


SMALLEST = 1e-9
"""Of a step size, before its logarithm."""


class Reader(NamedTuple):
    """Everything that changes while B lanes read: a value, never written in place."""

    weights: Weights
    """Medium-term memory: the dynamic tensors and the rule's own state beside them, (B, ...)."""
    state: State
    """Short-term memory."""
    age: Tensor
    """(B,) updates since the lane's weights were last theta_0."""
    exploded: Tensor
    """(B,) lanes whose loss passed `base.limit`: they start from theta_0 at the next segment."""
    aside: State | None = None
    """Short-term memory of the static model beside the lanes, where borders are looked for."""
    history: History | None = None
    """What was read, where phrases are remembered (`mlm.extensions.phrases`)."""

    def select(self, lanes: Tensor) -> Reader:
        """Some of the readers (their indices)."""
        weights = {n: w[lanes] for n, w in self.weights.items()}
        aside = None if self.aside is None else self.aside.select(lanes)
        state, age, exploded = self.state.select(lanes), self.age[lanes], self.exploded[lanes]
        history = None if self.history is None else self.history.select(lanes)
        return Reader(weights, state, age, exploded, aside, history)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for files."""
        tensors = {"age": self.age, "exploded": self.exploded}
        parts = (("state", self.state), ("aside", self.aside), ("history", self.history))
        for name, state in parts:
            if state is not None:
                tensors |= {f"{name}/{k}": t for k, t in enumerate(state.tensors())}
        return tensors | {f"weights/{n}": w for n, w in self.weights.items()}

    def of(self, tensors: Mapping[str, Tensor]) -> Reader:
        """The reader made of such `tensors`, where this one lies."""
        here = {n: tensors[n].to(self.age.device) for n in self.tensors()}

        def some(name: str, count: int) -> list[Tensor]:
            return [here[f"{name}/{k}"] for k in range(count)]

        state = self.state.of(some("state", len(self.state.tensors())))
        aside = self.aside and self.aside.of(some("aside", len(self.aside.tensors())))
        history = self.history and self.history.of(some("history", len(self.history.tensors())))
        weights = {n: here[f"weights/{n}"] for n in self.weights}
        return Reader(weights, state, here["age"], here["exploded"], aside, history)


def begin(base: AdaptationBase, lanes: int, rule: Bound | None = None) -> Reader:
    """`lanes` readers that know nothing but the long-term memory, for `rule` to write."""
    some = base.weights[base.dynamic[0]]
    state, still = (base.shape.initial_state(lanes, some.device, some.dtype) for _ in range(2))
    age = torch.zeros(lanes, device=some.device, dtype=some.dtype)
    start = base.start() if rule is None else rule.start()
    aside = None if base.borders is None else still
    if base.phrases is not None and not hasattr(base.shape, "run"):
        raise ValueError("phrases are remembered beside language models that stage 1 trains only")
    history = None if base.phrases is None else base.phrases.begin(lanes)
    none = torch.zeros_like(age, dtype=torch.bool)
    return Reader(lanes_of(start, lanes), state, age, none, aside, history)


@torch.no_grad()
def learning_at_once(base: AdaptationBase, rule: Bound) -> AdaptationBase:
    """The long-term memory with the a, c and d of `mlm.extensions.at_once`, if it wants them.

    a_v c_j comes nearest, in the mean of logarithms, to how far `rule` moves weight (v, j) of the
    output layer per unit of its gradient, a lane whose loss is the text's mean and which has read
    `SETTLED` segments; a_v d to that of the bias.
    """
    if not base.at_once:
        return base
    reader = begin(base, 1, rule)
    signal = Signal(torch.full_like(reader.age, base.loss), torch.full_like(reader.age, SETTLED))
    still, moved = (
        rule.update(
            reader.weights,
            {n: torch.full_like(reader.weights[n], g) for n in base.dynamic},
            signal,
        )
        for g in (0.0, 1.0)
    )
    logs = {
        n: (still[n] - moved[n])[0].clamp(min=SMALLEST).log() for n in base.dynamic if n in OUTPUT
    }
    rows_V = logs[OUTPUT[0]].mean(1)
    columns_I = logs[OUTPUT[0]].mean(0) - rows_V.mean()
    bias = (logs[OUTPUT[1]] - rows_V).mean() if OUTPUT[1] in logs else math.log(SMALLEST)
    own = torch.cat([columns_I, columns_I.new_tensor([float(bias)])])
    found = {ROWS: rows_V.exp(), COLUMNS: own.exp()}
    if RELATED in base.weights:
        found[TWICE] = at_once.twice(base.weights[RELATED])
    return dataclasses.replace(base, weights={**base.weights, **found})


def open_articles(
    start: Weights, reader: Reader, new_B: Tensor, flush_B: Tensor | None = None
) -> Reader:
    """Reset weights (to `start`), hidden state and age of the lanes that open an article.

    Those in `flush_B` keep the hidden state.
    """
    reset_B = new_B if flush_B is None else new_B | flush_B
    if not bool(reset_B.any()):
        return reader
    weights = reset_lanes(reader.weights, start, reset_B)
    state, aside = (s and s.keep(~new_B) for s in (reader.state, reader.aside))
    assert state is not None
    history = None if reader.history is None else reader.history.opened(reset_B)
    age, exploded = reader.age * ~reset_B, reader.exploded & ~reset_B
    return Reader(weights, state, age, exploded, aside, history)


class Scored(NamedTuple):
    """A segment read with the weights of before."""

    nll: Tensor
    """(B, M) nats, zero where the mask is False."""
    loss: Tensor
    """(B,) mean over the lane's tokens, nats per token."""
    gradients: Weights
    """Of (1/M) sum of the lane's nll by its own dynamic weights, (B, ...)."""
    state: State
    output: Tensor
    """(B, M, E): what the softmax saw."""
    shared: Weights
    """Of the same sum over all lanes, by the weights they share that were asked for."""
    heard: Heard | None = None
    """What phrases learn from."""

    def of_all_lanes(self, name: str) -> Tensor:
        """That gradient by a shared weight, or the sum over lanes by one that each has."""
        shared = self.shared.get(name)
        return self.gradients[name].sum(0) if shared is None else shared


def score_segment(
    base: AdaptationBase,
    reader: Reader,
    segment: Segment,
    learn: Sequence[str] = (),
    taught: Tensor | None = None,
    plain: bool = False,
) -> Scored:
    """Loss and gradient of one segment, every lane under its own weights.

    The gradient is that of sum(nll) / M also where a lane holds fewer than M tokens, so that a
    short end of an article moves the weights by as much as its tokens weigh. Of the weights in
    `learn` those that the lanes share get a gradient too. `taught` (B, M) names the tokens that
    teach, which gradient and mean loss are of; None = all. Where surprise counts
    (`mlm.extensions.surprise`), the gradient is that of F(nll), unless a `plain` one is asked for.
    """
    taught = segment.mask if taught is None else segment.mask & taught
    with torch.enable_grad():
        theta = {n: reader.weights[n].detach().requires_grad_() for n in base.dynamic}
        fixed = {n: base.weights[n].detach().requires_grad_() for n in learn if n not in theta}
        full = {**base.weights, **base.teaching(plain), **fixed, **theta}
        recall = recollection(base, reader, segment)
        share = taught.to(reader.age.dtype) / segment.inputs.shape[1]
        now = base.shape.read(full, segment.inputs, segment.targets, reader.state, share, recall)
        # A tail of the adaptive softmax that no token of the segment touches has no gradient.
        found = torch.autograd.grad(
            now.total,
            [*theta.values(), *fixed.values(), *([recall.recalled.rows] if recall else [])],
            allow_unused=True,
            materialize_grads=True,
        )
    nll = now.nll.detach() * segment.mask
    loss = (nll * taught).sum(1) / taught.sum(1).clamp(min=1)
    heard = recall and recall.recalled.heard(found[-1])
    gradients = dict(zip([*theta, *fixed], found, strict=False))
    shared = {name: gradients.pop(name) for name in fixed}
    state, output = now.state.detach(), now.output.detach()
    return Scored(nll, loss, gradients, state, output, shared, heard)


@torch.no_grad()
def score_static(base: AdaptationBase, state: State, segment: Segment) -> tuple[Tensor, State]:
    """Loss (B, M) of one segment under theta_0, without a gradient."""
    now = base.shape.read(base.static, segment.inputs, segment.targets, state)
    return now.nll * segment.mask, now.state


class Step(NamedTuple):
    """One segment read, and what its update was made of."""

    before: Reader
    """The lanes as they read it: those that opened an article, or had to be reset, at theta_0."""
    new: Tensor
    """(B,) lanes whose weights were reset before it."""
    taught: Tensor
    """(B, M) the tokens that its gradient is of."""
    scored: Scored
    signal: Signal
    after: Reader
    flushed: Tensor
    """(B,) lanes that the guard resets, now or before the next segment: report them."""

    def give(self, reader: Reader) -> None:
        """Let gradients, and weights that only lanes reset before the segment needed, be memory for
        others; `reader` is the one that the step was given."""
        buffers.give(self.scored.gradients.values())
        kept = {w.data_ptr() for some in (reader, self.after) for w in some.weights.values()}
        buffers.give(w for w in self.before.weights.values() if w.data_ptr() not in kept)


@torch.no_grad()
def step(
    base: AdaptationBase,
    rule: Bound,
    reader: Reader,
    segment: Segment,
    out: Weights | None = None,
    learn: Sequence[str] = (),
) -> Step:
    """One step of reading: predict, score, update, carry.

    Lanes flagged `segment.new` are reset first. Where `base.borders` finds that an article
    begins, the weights go back to theta_0 at once: what follows is read again, from there
    (`Beginning`). `out` receives the new weights (for speed; it must not be the reader's own).

    The guard: a lane whose weights are not finite, or give no finite loss, which shows before any
    target does, is reset to theta_0 and reads the segment from there; a lane whose mean loss
    passes `base.limit` is scored as it is and reset before its next segment. No other lane
    notices.
    """
    start = rule.start()
    new = segment.new | reader.exploded
    reader = open_articles(start, reader, new)
    scored = score_segment(base, reader, segment, learn)
    some = [w for n, w in reader.weights.items() if not n.endswith("/slow")]  # part of the weights
    whole = torch.stack([w.flatten(1).sum(1).isfinite() for w in some]).all(0)
    broken = ~(whole & scored.loss.isfinite() & _finite(scored.gradients))
    if bool(broken.any()):
        reader = open_articles(start, reader, broken)
        buffers.give(scored.gradients.values())
        scored = score_segment(base, reader, segment, learn)
        new = new | broken
    begun, aside = beginning(base, segment, reader)
    taught = segment.mask
    if begun is not None:
        taught = taught & begun.taught
        reader = open_articles(start, reader, torch.zeros_like(new), begun.lanes)
        buffers.give(scored.gradients.values())
        scored = begun.joined(scored, score_segment(base, reader, segment, learn, taught))
        new = new | begun.lanes
    signal = Signal(scored.loss, reader.age)
    weights = rule.update(reader.weights, scored.gradients, signal, out)
    exploded = (scored.loss > base.limit) & (reader.age > 0)
    history = remembered(base, reader, segment, scored.heard, taught)
    after = Reader(weights, scored.state, reader.age + 1, exploded, aside, history)
    return Step(reader, new, taught, scored, signal, after, broken | exploded)


class Recollection:
    """What phrases bring to a segment once its hidden states are known: `mlm.models.language_model.Recall`."""

    recalled: Recalled
    """Once the segment was read; its rows are a leaf of the loss's graph."""

    def __init__(self, phrases: Phrases, history: History, inputs_BT: Tensor) -> None:
        self.phrases, self.history, self.inputs = phrases, history, inputs_BT

    def __call__(self, output_BTE: Tensor) -> Weights:
        """How the softmax layer is told."""
        self.recalled = self.phrases.recall(self.history, self.inputs, output_BTE)
        return {SAID: self.recalled.rows.requires_grad_(), AGAIN: self.recalled.within}


def recollection(base: AdaptationBase, reader: Reader, segment: Segment) -> Recollection | None:
    """For `LanguageModel.read`; None = no phrases are remembered."""
    if base.phrases is None or reader.history is None:
        return None
    return Recollection(base.phrases, reader.history, segment.inputs)


def remembered(
    base: AdaptationBase, reader: Reader, segment: Segment, heard: Heard | None, taught: Tensor
) -> History | None:
    """The lanes' history with what the segment taught."""
    if base.phrases is None or reader.history is None or heard is None:
        return None
    return base.phrases.learned(reader.history, segment.inputs, heard, taught)


class Beginning(NamedTuple):
    """Where lanes that have learned from one article begin to read another (`mlm.extensions.boundaries`).

    It shows where the article's first line ends. From there on the lane reads with theta_0, which
    then learns from that line and what follows it.
    """

    lanes: Tensor
    """(B,) those lanes."""
    taught: Tensor
    """(B, M): tokens that teach; of these lanes those from the first line on."""
    follows: Tensor
    """(B, M): of these lanes, tokens predicted after the line's end was read."""

    def joined(self, before: Scored, again: Scored) -> Scored:
        """The segment as it was predicted: `before` the line's end was read, and `again`."""
        nll = torch.where(self.follows, again.nll, before.nll)
        output = torch.where(self.follows.unsqueeze(2), again.output, before.output)
        return again._replace(nll=nll, output=output)


@torch.no_grad()
def beginning(
    base: AdaptationBase, segment: Segment, reader: Reader
) -> tuple[Beginning | None, State | None]:
    """Where an article begins in the segment, the last one of each lane (None = nowhere), and
    `Reader.aside` after it.

    The static model says so: what a lane has learned moves its hidden state, and one border missed
    would hide those behind it.
    """
    if base.borders is None or reader.aside is None:
        return None, reader.aside
    run = getattr(base.shape, "run", None)
    if run is None:
        now = base.shape.read(base.static, segment.inputs, segment.targets, reader.aside)
    else:  # no softmax
        now = run(base.static, segment.inputs, reader.aside)
    found_BM = base.borders.opened(segment.inputs, segment.mask, now.output)
    lanes = found_BM.any(1) & (reader.age > 0)
    if not bool(lanes.any()):
        return None, now.state
    at_M = torch.arange(found_BM.shape[1], device=found_BM.device)
    end_B1 = (found_BM * at_M).amax(1, keepdim=True)
    ends_BM = (segment.inputs == base.borders.eos) & (at_M < end_B1)
    first_B1 = (ends_BM * at_M).amax(1, keepdim=True)
    follows, taught = at_M >= end_B1, at_M >= first_B1
    return Beginning(lanes, taught | ~lanes[:, None], follows & lanes[:, None]), now.state


def _finite(gradients: Weights) -> Tensor:
    """(B,) whether a lane's gradient is a number.

    A layer's weights have one if its bias has, to whose gradient every step of theirs is added.
    """
    bias = {n: n.rpartition(".")[0] + ".bias" for n in gradients}
    few = [g for n, g in gradients.items() if bias[n] == n or bias[n] not in gradients]
    return torch.stack([g.flatten(1).sum(1).isfinite() for g in few]).all(0)


def read(
    base: AdaptationBase, rule: Bound, reader: Reader, segment: Segment, out: Weights | None = None
) -> tuple[Reader, Tensor]:
    """`step` for those who only read on.

    Returns:
        the reader after the segment, and the losses (B, M) in nats.
    """
    now = step(base, rule, reader, segment, out)
    now.give(reader)
    return now.after, now.scored.nll
