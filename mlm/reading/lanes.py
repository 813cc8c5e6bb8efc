"""Lanes that read on, segment after segment, under theta_0 or under weights that a rule rewrites.

Both kinds have the same methods, so that whoever reads text need not know which it has.
Letters: B lanes, M tokens per segment, E width of what the softmax sees, V vocabulary, K likeliest
tokens.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mlm.models.base import AdaptationBase
from mlm.models.extension import Outcome
from mlm.models.language_model import Read, own_weights
from mlm.reading.static import StaticReader
from mlm.reading.step import (
    Reader,
    Telling,
    begin,
    carry_extras,
    open_lanes,
    prepared,
    step,
)
from mlm.rules.protocol import Bound
from mlm.text.streams import Segment


class Predicted(NamedTuple):
    """A segment as it was predicted."""

    nll: Tensor
    """(B, M) nats."""
    output: Tensor
    """(B, M, E): the last layer's hidden states."""
    flushed: list[int]
    """Lanes that the guard reset."""
    log_p: Tensor | None = None
    """(B, M, V): log-probabilities of all tokens, where they were asked for."""


class Details(NamedTuple):
    """What is expected where T tokens stand, before they are read; on the CPU."""

    entropy: np.ndarray
    """(T,) nats."""
    rank: np.ndarray
    """(T,) of the token that came; 1 = the most likely."""
    came: np.ndarray
    """(T,) the token that came."""
    pieces: np.ndarray
    """(T, K) the most likely ones."""
    best: np.ndarray
    """(T, K) nats of these."""


_AT_ONCE = 1 << 22
"""So many log-probabilities are looked at together: 16 MB in float32, and few copies of them."""


def details_of(log_p_NV: Tensor, came_N: Tensor, rows_T: Tensor, best: int) -> Details:
    """The details of some rows of log-probabilities.

    Args:
        came_N: the tokens that came.
        rows_T: which rows.
        best: K, at most V.
    """
    parts = []
    for rows in rows_T.split(max(1, _AT_ONCE // log_p_NV.shape[1])):
        log_p, came = log_p_NV[rows], came_N[rows]
        rank = (log_p > log_p.gather(1, came.unsqueeze(1))).sum(1) + 1
        likeliest, pieces = log_p.topk(best)
        entropy = -(log_p.exp() * log_p).nan_to_num(0).sum(1)
        found = entropy, rank, came, pieces, -likeliest
        parts.append([part.cpu().numpy() for part in found])
    return Details(*map(np.concatenate, zip(*parts, strict=True)))


class StaticLanes:
    """Lanes that read under theta_0."""

    def __init__(self, base: AdaptationBase, lanes: int) -> None:
        self.reader = StaticReader(base, lanes)

    def select(self, lanes: Tensor) -> None:
        """Go on with some of the lanes (their indices)."""
        self.reader.select(lanes)

    def copy(self) -> Self:
        """The same lanes; what either reads, the other does not notice."""
        found = copy.copy(self)
        found.reader = copy.copy(self.reader)
        return found

    def read(self, segment: Segment, full: bool = False) -> Predicted:
        """Predict a segment, without a gradient."""
        now = self.reader.read(segment, full)
        return Predicted(now.nll * segment.mask, now.output, [], now.log_p)

    def ahead(self, segment: Segment) -> Predicted:
        """Predict a segment, which leaves no trace; with the log-probabilities."""
        return self.copy().read(segment, full=True)


class AdaptingLanes:
    """Lanes whose weights a rule rewrites, in two sets of buffers by turns.

    Frozen, they read under the weights they have: nothing is learned, only the hidden state and
    which contexts have come are carried on.
    """

    def __init__(self, base: AdaptationBase, rule: Bound, lanes: int) -> None:
        self.base, self.rule = prepared(base, rule), rule
        self.frozen = False
        self.begin(begin(base, lanes, rule))

    def begin(self, reader: Reader) -> None:
        """Go on from here; `reader` is not written."""
        self.reader = reader
        self.spare, self.other = (
            {n: torch.empty_like(w) for n, w in reader.weights.items()} for _ in range(2)
        )

    def select(self, lanes: Tensor) -> None:
        """Go on with some of the lanes (their indices)."""
        self.reader = self.reader.select(lanes)
        self.spare, self.other = (
            {n: w[: len(lanes)] for n, w in some.items()} for some in (self.spare, self.other)
        )

    def copy(self) -> Self:
        """The same lanes; what either reads, the other does not notice."""
        found = copy.copy(self)
        weights = {n: w.clone() for n, w in self.reader.weights.items()}
        found.begin(self.reader._replace(weights=weights))
        return found

    def read(self, segment: Segment, full: bool = False) -> Predicted:
        """Predict a segment, then learn from it."""
        if self.frozen:
            return self._read_on(segment, full)
        now = step(self.base, self.rule, self.reader, segment, self.spare, full=full)
        now.release(self.reader)
        self.reader = now.after
        self.spare, self.other = self.other, self.spare
        flushed = now.flushed.nonzero().flatten().tolist()
        return Predicted(now.scored.nll, now.scored.output, flushed, now.scored.log_p)

    def ahead(self, segment: Segment) -> Predicted:
        """Predict a segment, which leaves no trace; with the log-probabilities."""
        _, _, now = self._predict(segment, full=True)
        return Predicted(now.nll * segment.mask, now.output, [], now.log_p)

    @torch.no_grad()
    def _predict(self, segment: Segment, full: bool) -> tuple[Reader, Telling, Read]:
        """The lanes as they read a segment, what extensions told, and the prediction."""
        reader, _ = open_lanes(self.base, self.rule.start(), self.reader, segment)
        weights = {**self.base.weights, **reader.weights}
        telling = Telling(self.base, weights, reader.extras, segment)
        share = segment.mask.to(reader.age.dtype) / segment.inputs.shape[1]
        share = share * 0 if self.frozen else share
        own = own_weights(weights)
        targets, state = segment.targets, reader.state
        now = self.base.model.read(own, segment.inputs, targets, state, share, telling, full=full)
        return reader, telling, now

    def _read_on(self, segment: Segment, full: bool) -> Predicted:
        reader, telling, now = self._predict(segment, full)
        nothing = Outcome(torch.zeros_like(now.output), torch.zeros_like(segment.mask))
        extras = carry_extras(self.base, reader.extras, segment, telling.told, nothing)
        awake = torch.zeros_like(reader.rest)  # weights that rest stay theta_0
        self.reader = reader._replace(state=now.state.detach(), rest=awake, extras=extras)
        return Predicted(now.nll * segment.mask, now.output, [], now.log_p)


Lanes = StaticLanes | AdaptingLanes


def lanes_under(base: AdaptationBase, rule: Bound | None, lanes: int) -> Lanes:
    """`lanes` lanes that have read nothing; `rule` None = static."""
    return StaticLanes(base, lanes) if rule is None else AdaptingLanes(base, rule, lanes)
