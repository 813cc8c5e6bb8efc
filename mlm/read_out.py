"""The read-out of phrases: how what is recalled enters the softmax is learned.

What a lane's contexts recall (`mlm.phrases`) is read through a map that all lanes share,

    logits_t = softmax layer(h_t + (I + D) sum_k m_k[c_k(t)]),

D = 0 as long as nothing is learned. A trained rule reads articles, and D (E, E) descends the loss
l_t of their tokens, of which it sees only what it does at once, not what other weights then learn
of it: with g_t the gradient by what the softmax saw,

    dD = mean_t g_t (sum_k m_k[c_k(t)])^T,

by Adam. What is written stays -g / w: D tells how far, and along which directions, what followed a
context in this article says what follows it now. It belongs to the rule, and is kept beside its
parameters.

Letters: B lanes, T tokens, E width of what the softmax sees.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from tqdm import tqdm

from mlm import buffers
from mlm.errors import UserError
from mlm.learner import Bound
from mlm.memory import LongTerm
from mlm.phrases import Phrases
from mlm.rollout import begin, learning_at_once, step
from mlm.scoring import read_in
from mlm.streams import LaneStream, Segment
from mlm.surprise import taught_by
from mlm.training import Text, cosine

NAME = "read_out"
"""Of D beside a rule's parameters."""
LANES = 8
TOKENS = 64
"""Of every lane, between two steps: so many, or one segment."""
PEAK = 3e-3
"""Of Adam's rate; cosine to zero."""


def with_read_out(memory: LongTerm, read_out: Tensor | None) -> LongTerm:
    """The long-term memory, its phrases read through D; of one without phrases, itself."""
    told = memory.phrases
    if told is None:
        return memory
    return dataclasses.replace(memory, phrases=told._replace(read_out=read_out))


def read_out_of(memory: LongTerm) -> Tensor | None:
    """D; None = zero, or no phrases."""
    return None if memory.phrases is None else memory.phrases.read_out


class ReadOut:
    """D while it is learned, and the lanes that read, each article from theta_0."""

    def __init__(self, memory: LongTerm, rule: Bound, lanes: int) -> None:
        """Goes on from the memory's D.

        Raises:
            ValueError: it remembers no phrases.
        """
        told = memory.phrases
        if told is None:
            raise ValueError("a read-out is of phrases, and none are remembered")
        self.read_out = self._start(told)
        self.optimizer = torch.optim.Adam([self.read_out], betas=(0.9, 0.99))
        memory = with_read_out(read_in(memory, "article"), self.read_out)
        self.memory, self.rule = learning_at_once(memory, rule), rule
        self.reader = begin(memory, lanes, rule)

    @staticmethod
    def _start(told: Phrases) -> Tensor:
        width = len(told.scale)
        return (
            told.scale.new_zeros(width, width) if told.read_out is None else told.read_out.clone()
        )

    def gradient(self, segment: Segment) -> tuple[Tensor, float]:
        """Read a segment: the gradient of the sum of its losses by D, and that sum in nats."""
        now = step(self.memory, self.rule, self.reader, segment)
        heard = now.scored.heard
        assert heard is not None
        now.give(self.reader)
        self.reader = now.after
        share = torch.full_like(now.scored.nll, 1 / segment.inputs.shape[1])
        weighs = taught_by(now.scored.nll, share, self.memory.slope())
        taught = (now.taught / weighs).unsqueeze(-1)  # where surprise counts, it is F(l)'s gradient
        found = (heard.gradient * taught).flatten(0, 1).t() @ heard.own.flatten(0, 1)
        return found, float(now.scored.nll.sum())

    def learn(self, segments: list[Segment], rate: float) -> float:
        """Read on, then one step of Adam; returns the nats of the segments."""
        found = [self.gradient(segment) for segment in segments]
        tokens = sum(int(segment.mask.sum()) for segment in segments)
        self.read_out.grad = torch.stack([g for g, _ in found]).sum(0) / max(1, tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return sum(nats for _, nats in found)


@torch.no_grad()
def learn_read_out(
    memory: LongTerm, rule: Bound, text: Text, words: int, seed: int, quiet: bool = True
) -> Tensor:
    """D (E, E), learned from `words` words of `text`, which are read again where it has fewer.

    Args:
        memory: that the rule reads with, phrases and all; D is learned on from its own.
        seed: of the articles' order.

    Raises:
        UserError: a loss is not finite.
    """
    lanes = LaneStream(text.articles, LANES, memory.segment, text.eos, seed)
    learner, tokens = ReadOut(memory, rule, LANES), 0
    wanted = int(words * text.tokens_per_word)
    device = learner.read_out.device
    with tqdm(total=wanted, desc="read-out", unit="tok", unit_scale=True, disable=quiet) as bar:
        while tokens < wanted:
            number = max(1, TOKENS // memory.segment)
            pieces = [next(lanes).to(device) for _ in range(number)]
            nats = learner.learn(pieces, PEAK * cosine(tokens, wanted))
            if not (math.isfinite(nats) and bool(learner.read_out.isfinite().all())):
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
