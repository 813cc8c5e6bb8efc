"""The read-out of phrases: how what is recalled enters the softmax is learned.

What a lane's contexts recall (`mlm.extensions.phrases`), m_t = sum_k m_k[c_k(t)], is read through a map, a
gate, two tables and a layer of units that all lanes share,

    logits_t = softmax layer(h_t + (1 + w . h_t) (I + D) m_t + B n_t + (C n_t) * h_t
                             + max(n_t) A relu(V [h_t, m_t, n_t])),

n_t the contexts' visits n / (1 + n), one number for every order k and zero where the context is
new, so that nothing is added where nothing is recalled; D, w, B, C and A are zero as long as
nothing is learned. A trained rule reads articles, and all six descend the loss of their tokens by
Adam, of which they see only what they do at once, not what other weights then learn of it. What is
written stays -g / w: D tells how far, and along which directions, what followed a context in this
article says what follows it now, w in which states it is worth listening to; B what follows
contexts that come again, whatever the article, C how much the hidden state is worth there, and the
units whatever else can be told from all of these. They belong to the rule, and are kept beside its
parameters.

Letters: B lanes, T tokens, E width of what the softmax sees, K orders, U units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from mlm.base.errors import UserError
from mlm.base.schedule import cosine
from mlm.extensions.phrases import Phrases, ReadOut
from mlm.extensions.surprise import taught_by
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.reading.scoring import read_in
from mlm.reading.step import begin, learning_at_once, step
from mlm.rules.protocol import Bound
from mlm.text.streams import LaneStream, Segment, Text

NAMES = tuple(f"read_out.{name}" for name in ReadOut._fields)
"""Of D, w, B, C, V and A beside a rule's parameters."""


UNITS = 128
"""U."""


LANES = 8


TOKENS = 512
"""Of every lane, between two steps: so many, or one segment."""


PEAK = 3e-3
"""Of Adam's rate for D; cosine to zero."""


OTHERS = 0.3
"""The rates of all others over that of D."""


def nothing_learned(phrases: Phrases, seed: int = 0) -> ReadOut:
    """The read-out that adds nothing to what is recalled; `seed` draws V."""
    width, orders = len(phrases.scale), len(phrases.steps)
    sees = 2 * width + orders
    drawn = torch.randn(UNITS, sees, generator=torch.Generator().manual_seed(seed)) / sees**0.5
    sizes = (width, width), (width,), (width, orders), (width, orders), (width, UNITS)
    of_map, gate, known, hold, outer = (phrases.scale.new_zeros(size) for size in sizes)
    return ReadOut(of_map, gate, known, hold, drawn.to(phrases.scale), outer)


def with_read_out(base: AdaptationBase, read_out: ReadOut | None) -> AdaptationBase:
    """The long-term memory, its phrases read so; of one without phrases, itself."""
    told = base.phrases
    if told is None:
        return base
    return dataclasses.replace(base, phrases=told._replace(read_out=read_out))


def read_out_of(base: AdaptationBase) -> ReadOut | None:
    """How its phrases are read; None = as they are, or no phrases."""
    return None if base.phrases is None else base.phrases.read_out


def as_tensors(read_out: ReadOut | None) -> dict[str, Tensor]:
    """For files, beside a rule's parameters."""
    return {} if read_out is None else dict(zip(NAMES, read_out, strict=True))


def taken(tensors: Mapping[str, Tensor]) -> tuple[ReadOut | None, dict[str, Tensor]]:
    """The inverse of `as_tensors`, and the other tensors of the file."""
    others = {n: t for n, t in tensors.items() if n not in NAMES}
    found = None if len(others) == len(tensors) else ReadOut(*(tensors[n] for n in NAMES))
    return found, others


class Learner:
    """A read-out while it is learned, and the lanes that read, each article from theta_0."""

    def __init__(self, base: AdaptationBase, rule: Bound, lanes: int, seed: int = 0) -> None:
        """Goes on from the memory's read-out, or from `nothing_learned`.

        Raises:
            ValueError: it remembers no phrases.
        """
        told = base.phrases
        if told is None:
            raise ValueError("a read-out is of phrases, and none are remembered")
        start = told.read_out or nothing_learned(told, seed)
        self.read_out = ReadOut(*(t.clone() for t in start))
        first, *others = self.read_out
        groups = [{"params": [first], "share": 1.0}, {"params": others, "share": OTHERS}]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        base = with_read_out(read_in(base, "article"), self.read_out)
        self.base, self.rule = learning_at_once(base, rule), rule
        self.reader = begin(base, lanes, rule)

    def gradient(self, segment: Segment) -> tuple[ReadOut, float]:
        """Read a segment: the gradient of its summed losses, and their sum in nats."""
        now = step(self.base, self.rule, self.reader, segment)
        heard = now.scored.heard
        assert heard is not None
        now.give(self.reader)
        self.reader = now.after
        share = torch.full_like(now.scored.nll, 1 / segment.inputs.shape[1])
        weighs = taught_by(now.scored.nll, share, self.base.slope())
        taught = (now.taught / weighs).unsqueeze(-1)  # where surprise counts, it is F(l)'s gradient
        with torch.enable_grad():
            learned = ReadOut(*(t.detach().requires_grad_() for t in self.read_out))
            said = learned.said(heard.own, 1 - heard.rates, heard.keys)
            found = torch.autograd.grad(said, list(learned), heard.gradient * taught)
        return ReadOut(*found), float(now.scored.nll.sum())

    def learn(self, segments: list[Segment], rate: float) -> float:
        """Read on, then one step of Adam; returns the nats of the segments."""
        found = [self.gradient(segment) for segment in segments]
        tokens = max(1, sum(int(segment.mask.sum()) for segment in segments))
        for learned, *parts in zip(self.read_out, *(g for g, _ in found), strict=True):
            learned.grad = torch.stack(parts).sum(0) / tokens
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.optimizer.step()
        return sum(nats for _, nats in found)


@torch.no_grad()
def learn_read_out(
    base: AdaptationBase, rule: Bound, text: Text, words: int, seed: int, quiet: bool = True
) -> ReadOut:
    """A read-out learned from `words` words of `text`, or all it has.

    Args:
        base: that the rule reads with, phrases and all; what it has learned is gone on from.
        seed: of the articles' order, and of V.

    Raises:
        UserError: a loss is not finite.
    """
    lanes = LaneStream(text.articles, LANES, base.segment, text.eos, seed)
    learner, tokens = Learner(base, rule, LANES, seed), 0
    wanted = min(text.tokens, int(words * text.tokens_per_word))
    device = learner.read_out.map.device
    with tqdm(total=wanted, desc="read-out", unit="tok", unit_scale=True, disable=quiet) as bar:
        while tokens < wanted:
            number = max(1, TOKENS // base.segment)
            pieces = [next(lanes).to(device) for _ in range(number)]
            nats = learner.learn(pieces, PEAK * cosine(tokens, wanted))
            finite = all(bool(t.isfinite().all()) for t in learner.read_out)
            if not (math.isfinite(nats) and finite):
                raise UserError(
                    f"--meta.read-out-words: after {tokens:,} tokens the loss is {nats} nats; the "
                    "rule's weights diverged, train it again with a smaller --meta.learning-rate"
                )
            read = sum(int(piece.mask.sum()) for piece in pieces)
            tokens += read
            bar.update(read)
            bar.set_postfix_str(f"loss {nats / read:.3f}")
    buffers.clear()
    return learner.read_out
