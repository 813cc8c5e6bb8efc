"""The n-gram read-out: how what n-gram memory recalls enters the softmax is learned.

What a lane's contexts recall (`mlm.extensions.ngram_memory`), m_t = sum_k m_k[c_k(t)], is read
through a map, a gate, two tables and a layer of units that all lanes share,

    logits_t = output layer(h_t + (1 + w . h_t) (I + D) m_t + B n_t + (C n_t) * h_t
                            + max(n_t) A relu(V [h_t, m_t, n_t])),

n_t the contexts' visits n / (1 + n), one number for every order k and zero where the context is
new, so that nothing is added where nothing is recalled; D, w, B, C and A are zero as long as
nothing is learned. A trained rule reads articles, and all six descend the loss of their tokens by
Adam; their effect on later weight updates is ignored. What is written stays -g / w: D tells how
far, and along which directions, what followed a context in this article says what follows it now, w
in which states it is worth listening to; B what follows contexts that come again, whatever the
article, C how much the hidden state is worth there, and the units whatever else can be told from
all of these. They belong to the rule, and are kept beside its parameters.

Letters: B lanes, T tokens, E width of what the softmax sees, K orders, U units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.progress import NOTHING_KEPT, Progress, adam_tensors, load_adam
from mlm.extensions.learning import Course, learn_by_reading
from mlm.extensions.ngram_memory import ETA, SCALE, Lookup, NGramMemory
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Extent, Need, Plan, Told
from mlm.models.language_model import Weights, gradient_share
from mlm.reading.step import begin, prepared, step
from mlm.rules.gates import LinearGates
from mlm.rules.protocol import Bound
from mlm.text.streams import LaneStream, Segment, Text

UNITS = 128
"""U."""
LANES = 8
TOKENS = 512
"""Of every lane, between two steps: so many, or one segment."""
PEAK = 3e-3
"""Of Adam's rate for D; cosine to zero."""
OTHERS_SHARE = 0.3
"""The rates of all others over that of D."""


class ReadOut(NamedTuple):
    """How what is recalled enters the softmax."""

    map: Tensor
    """(E, E): D."""
    gate: Tensor
    """(E,): w."""
    known: Tensor
    """(E, K): B."""
    hold: Tensor
    """(E, K): C."""
    inner: Tensor
    """(U, 2 E + K): V."""
    outer: Tensor
    """(E, U): A."""

    def said(self, own_E: Tensor, visited_K: Tensor, state_E: Tensor) -> Tensor:
        """What the softmax sees beside h: m_t, n_t and h_t put together as above;
        all of them with the same dimensions before the last."""
        gate = 1 + (state_E @ self.gate).unsqueeze(-1)
        mapped = gate * (own_E + F.linear(own_E, self.map))
        known = F.linear(visited_K, self.known) + F.linear(visited_K, self.hold) * state_E
        units = F.linear(torch.cat([state_E, own_E, visited_K], -1), self.inner).relu()
        return mapped + known + F.linear(units, self.outer) * visited_K.amax(-1, keepdim=True)


@dataclass(frozen=True)
class NGramReadOut(Extension):
    """A learned way from what n-gram memory recalls to the output layer."""

    words: int = 0
    """Words of --meta.text, at most all of it, that a trained rule reads to learn how what n-gram
    memory recalls enters the softmax, kept where it gains on validation; 0 = as it is."""
    name: ClassVar[str] = "ngram_read_out"

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.words > 0

    def active(self, weights: Weights) -> bool:
        """Where it was learned, or will be."""
        return self.enabled or self.of(weights) is not None

    def applies_to(self, rule: Any) -> bool:
        """Learned rules, as n-gram memory."""
        return isinstance(rule, LinearGates)

    def problems(self, plan: Plan) -> Sequence[str]:
        """There must be something to be read out."""
        if any(isinstance(extension, NGramMemory) for extension in plan.extensions):
            return ()
        return (
            f"--ngram-read-out.words is {self.words}; it reads n-gram memory out, and there is "
            "none: set --ngram-memory.tokens, or use 0",
        )

    def after_rule_need(self, extent: Extent) -> Need:
        """Lanes that read, each with the gradient and the weights before and after it."""
        tokens = min(extent.text, self.words * extent.tokens_per_word)
        return Need(4 * 4 * LANES * extent.weights, tokens)

    def of(self, weights: Weights) -> ReadOut | None:
        """The read-out among the weights; None = it is not learned."""
        if self.key(ReadOut._fields[0]) not in weights:
            return None
        return ReadOut(*(weights[self.key(name)] for name in ReadOut._fields))

    def weights(self, read_out: ReadOut) -> Weights:
        """The inverse of `of`."""
        return {self.key(name): value for name, value in read_out._asdict().items()}

    @torch.no_grad()
    def before(
        self, weights: Weights, value: Any, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        """What is recalled, read out, in place of the rows alone."""
        read_out, found = self.of(weights), told.notes.get(NGramMemory.name)
        if read_out is None or found is None:
            return told
        added = read_out.said(found.rows, 1 - found.rates, hidden_BTE)
        return told._replace(terms=told.terms._replace(added=added))

    def after_rule(
        self,
        base: AdaptationBase,
        bound: Bound,
        text: Text,
        seed: int,
        quiet: bool,
        progress: Progress,
    ) -> Weights:
        """A read-out learned with a trained rule."""
        if not self.enabled:
            return {}
        return self.weights(learn_read_out(base, bound, text, self.words, seed, quiet, progress))


def nothing_learned(base: AdaptationBase, seed: int = 0) -> ReadOut:
    """The read-out that adds nothing to what is recalled; `seed` draws V."""
    like, steps = (base.weights[f"{NGramMemory.name}/{name}"] for name in (SCALE, ETA))
    width, orders = len(like), len(steps)
    sees = 2 * width + orders
    drawn = torch.randn(UNITS, sees, generator=torch.Generator().manual_seed(seed)) / sees**0.5
    sizes = (width, width), (width,), (width, orders), (width, orders), (width, UNITS)
    of_map, gate, known, hold, outer = (like.new_zeros(size) for size in sizes)
    return ReadOut(of_map, gate, known, hold, drawn.to(like), outer)


class ReadOutTrainer:
    """A read-out while it is learned, and the lanes that read, each article from theta_0."""

    def __init__(self, base: AdaptationBase, rule: Bound, lanes: int, seed: int = 0) -> None:
        """Goes on from the base's read-out, or from `nothing_learned`.

        Raises:
            ValueError: it has no n-gram memory.
        """
        own = NGramReadOut()
        parts = [e for e in base.extensions if not isinstance(e, NGramReadOut)]
        memory = [k for k, extension in enumerate(parts) if isinstance(extension, NGramMemory)]
        if not memory:
            raise ValueError("a read-out is of n-gram memory, and there is none")
        parts.insert(memory[0] + 1, own)
        base = dataclasses.replace(base, extensions=tuple(parts))
        start = own.of(base.weights) or nothing_learned(base, seed)
        self.read_out = ReadOut(*(t.clone() for t in start))
        first, *others = self.read_out
        groups = [{"params": [first], "share": 1.0}, {"params": others, "share": OTHERS_SHARE}]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        base = base.for_protocol("article").with_weights(own.weights(self.read_out))
        self.base, self.rule = prepared(base, rule), rule
        self.reader = begin(self.base, lanes, rule)

    def gradient(self, segment: Segment) -> tuple[ReadOut, float]:
        """Read a segment: the gradient of its summed losses, and their sum in nats."""
        now = step(self.base, self.rule, self.reader, segment)
        found: Lookup = now.scored.told.notes[NGramMemory.name]
        gradient = now.scored.by_added
        assert gradient is not None
        now.release(self.reader)
        self.reader = now.after
        share = torch.full_like(now.scored.nll, 1 / segment.inputs.shape[1])
        weighs = gradient_share(now.scored.nll, share, now.scored.told.terms.slope)
        taught = (now.taught / weighs).unsqueeze(-1)  # the gradient is of weighted losses
        with torch.enable_grad():
            learned = ReadOut(*(t.detach().requires_grad_() for t in self.read_out))
            said = learned.said(found.rows, 1 - found.rates, found.keys)
            parts = torch.autograd.grad(said, list(learned), gradient * taught)
        return ReadOut(*parts), float(now.scored.nll.sum())

    def learn(self, segments: Sequence[Segment], rate: float) -> float:
        """Read on, then one step of Adam; returns the nats of the segments."""
        found = [self.gradient(segment) for segment in segments]
        tokens = max(1, sum(int(segment.mask.sum()) for segment in segments))
        for learned, *parts in zip(self.read_out, *(g for g, _ in found), strict=True):
            learned.grad = torch.stack(parts).sum(0) / tokens
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.optimizer.step()
        return sum(nats for _, nats in found)

    def learned(self) -> ReadOut:
        """The read-out."""
        return self.read_out

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the place in the text."""
        found = {f"read_out/{n}": t for n, t in self.read_out._asdict().items()}
        found |= {f"reader/{n}": t for n, t in self.reader.tensors().items()}
        return found | adam_tensors(self.optimizer, ReadOut._fields)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`: in place, because the base that reads holds the read-out."""
        for name, learned in self.read_out._asdict().items():
            learned.copy_(tensors[f"read_out/{name}"])
        load_adam(self.optimizer, ReadOut._fields, tensors)
        self.reader = self.reader.of({n: tensors[f"reader/{n}"] for n in self.reader.tensors()})


def _diverged(tokens: int, nats: float) -> UserError:
    return UserError(
        f"--ngram-read-out.words: after {tokens:,} tokens the loss is {nats} nats; the "
        "rule's weights diverged, train it again with a smaller --meta.learning-rate"
    )


@torch.no_grad()
def learn_read_out(
    base: AdaptationBase,
    rule: Bound,
    text: Text,
    words: int,
    seed: int,
    quiet: bool = True,
    progress: Progress = NOTHING_KEPT,
) -> ReadOut:
    """A read-out learned from `words` words of `text`, or all it has.

    Args:
        base: that the rule reads with, with n-gram memory; what it has learned is gone on from.
        seed: of the articles' order, and of V.
        progress: where it is kept how far learning has come.

    Raises:
        UserError: a loss is not finite.
    """
    lanes = LaneStream(text.articles, LANES, base.segment, text.eos, seed)
    learner = ReadOutTrainer(base, rule, LANES, seed)
    course = Course(
        NGramReadOut.name,
        "read-out",
        min(text.tokens, int(words * text.tokens_per_word)),
        max(1, TOKENS // base.segment),
        PEAK,
        _diverged,
    )
    learn_by_reading(learner, lanes, course, quiet, progress)
    return learner.read_out
