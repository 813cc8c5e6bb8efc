"""One step of reading: predict -> score -> update -> carry.

It serves training, evaluation and the Python API. It is strictly causal: a segment is scored with
the weights of before, and only then changes them.
Letters: B lanes, M tokens per segment, E width of what the softmax sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm.base.processes import ranks
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase, lanes_of, reset_lanes
from mlm.models.extension import GrowingValue, LaneValue, Outcome, Restart, Told
from mlm.models.language_model import OutputTerms, Read, State, Weights, own_weights
from mlm.rules.protocol import Bound, Signal
from mlm.text.streams import Segment

Extras = dict[str, LaneValue]
"""What extensions remember of the lanes, by their names."""


class Reader(NamedTuple):
    """Everything that changes while B lanes read: a value, never written in place."""

    weights: Weights
    """Medium-term memory: the dynamic tensors and the rule's own state beside them, (B, ...)."""
    state: State
    """Short-term memory."""
    age: Tensor
    """(B,) updates since the lane's weights were last theta_0."""
    rest: Tensor
    """(B,) segments that the guard has the lane read under theta_0 from here on, int64."""
    bursts: Tensor
    """(B,) how often the lane exploded (`exploded_lanes`) in this article, int64."""
    extras: Extras = {}  # noqa: RUF012 (never written)

    def select(self, lanes: Tensor) -> Reader:
        """Some of the readers (their indices)."""
        weights = {n: w[lanes] for n, w in self.weights.items()}
        extras = {n: value.select(lanes) for n, value in self.extras.items()}
        numbers = (self.age[lanes], self.rest[lanes], self.bursts[lanes])
        return Reader(weights, self.state.select(lanes), *numbers, extras)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for files."""
        tensors = {"age": self.age, "rest": self.rest, "bursts": self.bursts}
        parts = {"state": self.state, **{f"extras/{n}": v for n, v in self.extras.items()}}
        for name, value in parts.items():
            tensors |= {f"{name}/{k}": t for k, t in enumerate(value.tensors())}
        return tensors | {f"weights/{n}": w for n, w in self.weights.items()}

    def tensors_of_all(self, lanes: int) -> dict[str, Tensor]:
        """`tensors` of all `lanes` where processes (`mlm.base.processes`) read some each; in the
        first process only."""
        here = ranks()
        if here.world == 1:
            return self.tensors()
        growing = {n: v for n, v in self.extras.items() if isinstance(v, GrowingValue)}
        sizes = here.gather({n: value.size for n, value in growing.items()})
        rest = {n: v for n, v in self.extras.items() if n not in growing}
        own = self._replace(extras=rest).tensors()
        for name, value in growing.items():
            columns = value.columns(max(found[name] for found in sizes))
            own |= {f"extras/{name}/{k}": t for k, t in enumerate(columns)}
        found = here.of_all_lanes(own, lanes)
        for name, value in growing.items() if here.first else ():
            names = [f"extras/{name}/{k}" for k in range(len(value.tensors()))]
            found |= zip(names, value.of([found[n] for n in names]).tensors(), strict=True)
        return found

    def of_share(self, tensors: Mapping[str, Tensor], lanes: int) -> Reader:
        """What this process reads of the reader of all `lanes` made of such `tensors`."""
        own = ranks().share(lanes)
        found = self.of(tensors)
        if len(own) == lanes:
            return found
        return found.select(torch.arange(own.start, own.stop, device=self.age.device))

    def of(self, tensors: Mapping[str, Tensor]) -> Reader:
        """The reader made of such `tensors`, where this one lies.

        Raises:
            KeyError, ValueError: one is missing, or of another kind.
        """
        own = self.tensors()
        here = {n: tensors[n].to(self.age.device) for n in own}
        odd = [n for n, tensor in own.items() if here[n].dtype != tensor.dtype]
        if odd:
            raise ValueError(f"{odd[0]} is of another kind")

        def some(name: str, like: Any) -> list[Tensor]:
            return [here[f"{name}/{k}"] for k in range(len(like.tensors()))]

        state = self.state.of(some("state", self.state))
        extras = {n: value.of(some(f"extras/{n}", value)) for n, value in self.extras.items()}
        weights = {n: here[f"weights/{n}"] for n in self.weights}
        return Reader(weights, state, here["age"], here["rest"], here["bursts"], extras)


def begin_extras(base: AdaptationBase, lanes: int) -> Extras:
    """What extensions remember of lanes that have read nothing."""
    values = {extension.name: extension.begin(base, lanes) for extension in base.extensions}
    return {name: value for name, value in values.items() if value is not None}


def begin(base: AdaptationBase, lanes: int, rule: Bound | None = None) -> Reader:
    """`lanes` readers that know nothing but the long-term memory, for `rule` to write."""
    some = base.weights[base.dynamic[0]]
    state = base.model.initial_state(lanes, some.device, some.dtype)
    age = torch.zeros(lanes, device=some.device, dtype=some.dtype)
    start = base.start() if rule is None else rule.start()
    none = torch.zeros_like(age, dtype=torch.int64)
    return Reader(lanes_of(start, lanes), state, age, none, none, begin_extras(base, lanes))


@torch.no_grad()
def prepared(base: AdaptationBase, rule: Bound) -> AdaptationBase:
    """The base with what its extensions derive from the rule that reads."""
    found: Weights = {}
    for extension in base.extensions:
        found |= extension.prepare(base, rule)
    return base.with_weights(found) if found else base


def open_extras(base: AdaptationBase, extras: Extras, new_B: Tensor, reset_B: Tensor) -> Extras:
    """The extensions' values where lanes open articles; see `Extension.open`."""
    opened = dict(extras)
    for extension in base.extensions:
        if extension.name in opened:
            opened[extension.name] = extension.open(opened[extension.name], new_B, reset_B)
    return opened


def open_articles(
    base: AdaptationBase,
    start: Weights,
    reader: Reader,
    new_B: Tensor,
    flush_B: Tensor | None = None,
) -> Reader:
    """Reset weights (to `start`), hidden state and age of the lanes that open an article.

    Those in `flush_B` keep the hidden state.
    """
    reset_B = new_B if flush_B is None else new_B | flush_B
    if not bool(reset_B.any()):
        return reader
    weights = reset_lanes(reader.weights, start, reset_B)
    state, extras = reader.state.keep(~new_B), open_extras(base, reader.extras, new_B, reset_B)
    age = reader.age * ~reset_B
    return reader._replace(weights=weights, state=state, age=age, extras=extras)


def open_lanes(
    base: AdaptationBase, start: Weights, reader: Reader, segment: Segment
) -> tuple[Reader, Tensor]:
    """The reader before a segment, and (B,) the lanes whose weights go back to theta_0 there.

    Lanes that open an article do, and those that rest; a lane that has just exploded loses the
    hidden state, too.
    """
    rests = reader.rest > 0
    exploded = rests & (reader.age > 1)  # while a lane rests it is one
    return open_articles(base, start, reader, segment.new | exploded, rests), segment.new | rests


class Telling:
    """What extensions tell the output layer of a segment: a `Tell` that keeps what was told."""

    def __init__(
        self, base: AdaptationBase, weights: Weights, extras: Extras, segment: Segment
    ) -> None:
        self.base, self.weights, self.extras, self.segment = base, weights, extras, segment
        self.plain = False
        """Tokens weigh the same in the gradient, whatever extensions say."""
        self.told = Told(OutputTerms(), {})

    def __call__(self, hidden_BTE: Tensor) -> OutputTerms:
        """See `mlm.models.language_model.Tell`; what is added becomes a leaf of the graph."""
        told = self.told
        for extension in self.base.extensions:
            value = self.extras.get(extension.name)
            told = extension.before(self.weights, value, self.segment, hidden_BTE, told)
        terms = told.terms
        if terms.added is not None:
            terms = terms._replace(added=terms.added.detach().requires_grad_())
        if self.plain:
            terms = terms._replace(slope=None)
        self.told = told._replace(terms=terms)
        return terms

    def leaves(self) -> list[Tensor]:
        """What was added to the hidden states, if anything."""
        added = self.told.terms.added
        return [] if added is None else [added]


def carry_extras(
    base: AdaptationBase, extras: Extras, segment: Segment, told: Told, out: Outcome
) -> Extras:
    """The extensions' values behind a segment."""
    after = dict(extras)
    for extension in base.extensions:
        name = extension.name
        if name in after:
            note = told.notes.get(name)
            after[name] = extension.after(base.weights, after[name], segment, note, out)
    return after


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
    """(B, M, E): the last layer's hidden states."""
    shared: Weights
    """Of the same sum over all lanes, by the weights they share that were asked for."""
    told: Told
    """What extensions told the output layer."""
    by_added: Tensor | None
    """(B, M, E): of the same sum by what extensions added to the hidden states, if anything."""
    log_p: Tensor | None
    """(B, M, V): log-probabilities of all tokens, where they were asked for."""

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
    full: bool = False,
) -> Scored:
    """Loss and gradient of one segment, every lane under its own weights.

    The gradient is that of sum(nll) / M also where a lane holds fewer than M tokens, so that a
    short end of an article moves the weights by as much as its tokens weigh. Of the weights in
    `learn` those that the lanes share get a gradient too. `taught` (B, M) names the tokens that
    teach, which gradient and mean loss are of; None = all. Where an extension weighs tokens, the
    gradient follows it, unless a `plain` one is asked for. `full`: whether `log_p` is wanted.
    """
    taught = segment.mask if taught is None else segment.mask & taught
    with torch.enable_grad():
        theta = {n: reader.weights[n].detach().requires_grad_() for n in base.dynamic}
        fixed = {n: base.weights[n].detach().requires_grad_() for n in learn if n not in theta}
        weights = {**base.weights, **fixed, **theta}
        telling = Telling(base, weights, reader.extras, segment)
        telling.plain = plain
        share = taught.to(reader.age.dtype) / segment.inputs.shape[1]
        own = own_weights(weights)
        now = base.model.read(
            own, segment.inputs, segment.targets, reader.state, share, telling, full=full
        )
        # A tail of the adaptive softmax that no token of the segment touches has no gradient.
        found = torch.autograd.grad(
            now.total,
            [*theta.values(), *fixed.values(), *telling.leaves()],
            allow_unused=True,
            materialize_grads=True,
        )
    nll = now.nll.detach() * segment.mask
    loss = (nll * taught).sum(1) / taught.sum(1).clamp(min=1)
    by_added = found[-1] if telling.leaves() else None
    gradients = dict(zip([*theta, *fixed], found, strict=False))
    shared = {name: gradients.pop(name) for name in fixed}
    state, output = now.state.detach(), now.output.detach()
    return Scored(nll, loss, gradients, state, output, shared, telling.told, by_added, now.log_p)


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

    def release(self, reader: Reader) -> None:
        """Let gradients, and weights that only lanes reset before the segment needed, be memory for
        others; `reader` is the one that the step was given."""
        buffers.release(self.scored.gradients.values())
        kept = {w.data_ptr() for some in (reader, self.after) for w in some.weights.values()}
        buffers.release(w for w in self.before.weights.values() if w.data_ptr() not in kept)


@torch.no_grad()
def step(
    base: AdaptationBase,
    rule: Bound,
    reader: Reader,
    segment: Segment,
    out: Weights | None = None,
    learn: Sequence[str] = (),
    full: bool = False,
) -> Step:
    """One step of reading: predict, score, update, carry.

    Lanes flagged `segment.new` are reset first. Where an extension finds that an article begins
    unmarked, the weights go back to theta_0 at once: what follows is read again, from there
    (`Restart`). `out` receives the new weights (for speed; it must not be the reader's own);
    `full` asks for the log-probabilities of all tokens (`Scored.log_p`).

    The guard: lanes that explode (`exploded_lanes`) are scored as they are, reset before the next
    segment, and go on under theta_0 for a while (`rested`); lanes with non-finite weights, or
    without a finite loss (which shows before any target does), are reset to theta_0 at once and
    read the segment from there. No other lane notices.
    """
    start = rule.start()
    reader, new = open_lanes(base, start, reader, segment)
    scored = score_segment(base, reader, segment, learn, full=full)
    some = [w for n, w in reader.weights.items() if not n.endswith("/slow")]  # part of the weights
    whole = torch.stack([w.flatten(1).sum(1).isfinite() for w in some]).all(0)
    broken = ~(whole & scored.loss.isfinite() & _finite(scored.gradients))
    if bool(broken.any()):
        reader = open_articles(base, start, reader, broken)
        buffers.release(scored.gradients.values())
        scored = score_segment(base, reader, segment, learn, full=full)
        new = new | broken
    restart, reader = find_restart(base, reader, segment)
    taught, begins = segment.mask, segment.new
    if restart is not None:
        begins = begins | restart.lanes
        taught = taught & restart.taught
        reader = open_articles(base, start, reader, torch.zeros_like(new), restart.lanes)
        buffers.release(scored.gradients.values())
        again = score_segment(base, reader, segment, learn, taught, full=full)
        scored = _joined(restart, scored, again)
        new = new | restart.lanes
    signal = Signal(scored.loss, reader.age)
    weights = rule.update(reader.weights, scored.gradients, signal, out)
    exploded = exploded_lanes(base, segment, taught, scored.loss, reader.age)
    outcome = Outcome(scored.by_added, taught)
    extras = carry_extras(base, reader.extras, segment, scored.told, outcome)
    guarded = rested(reader, begins, exploded)
    after = Reader(weights, scored.state, reader.age + 1, *guarded, extras)
    return Step(reader, new, taught, scored, signal, after, broken | exploded)


def read_theta_0(
    base: AdaptationBase, state: State, extras: Extras, segment: Segment, full: bool = False
) -> tuple[Read, Telling]:
    """A segment read under theta_0, which all lanes share; `base` is one `of_model`."""
    telling = Telling(base, base.weights, extras, segment)
    tell = telling if base.extensions else None
    inputs, targets = segment.inputs, segment.targets
    return base.model.read(base.static, inputs, targets, state, tell=tell, full=full), telling


REST, LONGER = 16, 4
"""Segments that a lane rests after it exploded, and how many times longer after each time more."""
GUARD = 2
"""Of `exploded_lanes`; another number, another meaning of `--adapt.guard`."""


def rested(reader: Reader, begins_B: Tensor, exploded_B: Tensor) -> tuple[Tensor, Tensor]:
    """`Reader.rest` and `Reader.bursts` behind a segment.

    A text on which a rule explodes once makes it explode again: resting longer each time, a lane
    explodes at most about log4 N times in N segments. Articles that begin (`begins_B`) start anew.
    """
    bursts_B = torch.where(begins_B, 0, reader.bursts) + exploded_B
    left_B = torch.where(begins_B, 0, reader.rest - 1).clamp(min=0)
    return torch.where(exploded_B, REST * LONGER ** (bursts_B - 1).clamp(min=0), left_B), bursts_B


@torch.no_grad()
def exploded_lanes(
    base: AdaptationBase, segment: Segment, taught: Tensor, loss_B: Tensor, age_B: Tensor
) -> Tensor:
    """(B,) lanes that the guard resets behind a segment.

    They have learned something, lose more than guessing would (`base.guess`), and `base.limit` nats
    per token more than theta_0 does on the same tokens: text that is hard for the model itself
    resets nobody. theta_0 reads the segment from an empty hidden state, as the lane would have, had
    it been reset before. So nothing is carried along, and only lanes that lose more than guessing
    cost time.

    Args:
        taught: (B, M) the tokens that the loss is of.
        loss_B: mean loss of every lane, nats per token.
        age_B: updates since its weights were theta_0.
    """
    above = (loss_B > base.guess) & (age_B > 0) & (base.limit < math.inf)
    if not bool(above.any()):
        return above
    home, some = base.of_model(), segment.select(above.cpu().numpy().nonzero()[0])
    lanes = len(some.article)
    state = base.model.initial_state(lanes, loss_B.device, loss_B.dtype)
    nll = read_theta_0(home, state, begin_extras(home, lanes), some)[0].nll
    counts = taught[above]
    static = (nll * counts).sum(1) / counts.sum(1).clamp(min=1)
    return above.masked_scatter(above, loss_B[above] - static > base.limit)


@torch.no_grad()
def find_restart(
    base: AdaptationBase, reader: Reader, segment: Segment
) -> tuple[Restart | None, Reader]:
    """Which lanes began another article within the segment (None = none did), and the reader in
    which the extensions that looked for it have read the segment."""
    found, extras = None, dict(reader.extras)
    for extension in base.extensions:
        value = extras.get(extension.name)
        restart, value = extension.restart(base, value, segment, reader.age)
        if value is not None:
            extras[extension.name] = value
        found = restart if found is None else found
    return found, reader._replace(extras=extras)


def _joined(restart: Restart, before: Scored, again: Scored) -> Scored:
    """The segment as it was predicted: `before` the article began, and `again` from there."""
    nll = torch.where(restart.follows, again.nll, before.nll)
    follows = restart.follows.unsqueeze(2)
    output, log_p = torch.where(follows, again.output, before.output), again.log_p
    if log_p is not None and before.log_p is not None:
        log_p = torch.where(follows, log_p, before.log_p)
    return again._replace(nll=nll, output=output, log_p=log_p)


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
    now.release(reader)
    return now.after, now.scored.nll
