"""Score articles under an update rule, in protocol `article` or `stream`; words from tokens.

Letters: B lanes, A articles, M tokens per segment, E width of what the softmax sees.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mlm.base.errors import UserError
from mlm.extensions.ngrams import Trail, ngrams_of
from mlm.extensions.phrases import SAID
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.models.recurrent import BaseModel
from mlm.reading.cache import Cache, CacheSetting
from mlm.reading.step import begin, learning_at_once, step
from mlm.rules.protocol import Bound
from mlm.text.streams import LaneStream, Segment, Text


class Scores(NamedTuple):
    """Losses of one rule."""

    nll: list[np.ndarray]
    """Per article: nats of every token, float64."""
    seconds: float
    """Of the pass, without the caches for the losses without one."""
    flushes: list[tuple[int, int]]
    """(article, first token of the segment) wherever the guard reset a lane."""
    cached: list[Scores]
    """The same pass with a neural cache on top: one for each setting asked for."""

    @property
    def total(self) -> float:
        """Nats of all tokens; infinite if any is not a number."""
        total = float(sum(a.sum() for a in self.nll))
        return total if np.isfinite(total) else float("inf")


class _Heard(NamedTuple):
    """A segment as it was predicted."""

    nll: Tensor
    """(B, M) nats."""
    output: Tensor
    """(B, M, E): what the softmax saw."""
    flushed: list[int]
    """Lanes that the guard reset."""


class _Static:
    """Lanes that read under theta_0."""

    def __init__(self, base: AdaptationBase, lanes: int) -> None:
        some = base.weights[base.dynamic[0]]
        self.base = base
        self.state = base.shape.initial_state(lanes, some.device, some.dtype)
        self.ngrams = base.phrases and base.phrases.ngrams
        self.trail = Trail.begin(lanes, some.device)

    def select(self, lanes: Tensor) -> None:
        """Go on with some of the lanes (their indices)."""
        self.state = self.state.select(lanes)
        self.trail = self.trail.select(lanes)

    @torch.no_grad()
    def read(self, segment: Segment) -> _Heard:
        """Predict a segment, without a gradient."""
        state = self.state.keep(~segment.new)
        weights = {**self.base.static, **self._recall(segment)}
        now = self.base.shape.read(weights, segment.inputs, segment.targets, state)
        self.state = now.state
        return _Heard(now.nll * segment.mask, now.output, [])

    def _recall(self, segment: Segment) -> Weights:
        """What n-grams say, if the model has any."""
        if self.ngrams is None:
            return {}
        rows, self.trail = self.ngrams.follow(self.trail, segment.inputs, segment.new)
        return {SAID: self.ngrams.said(rows)}


class _Adapting:
    """Lanes whose weights a rule rewrites, in two sets of buffers by turns."""

    def __init__(self, base: AdaptationBase, rule: Bound, lanes: int) -> None:
        self.base, self.rule = learning_at_once(base, rule), rule
        self.reader = begin(base, lanes, rule)
        weights = self.reader.weights
        self.spare, self.other = (
            {n: torch.empty_like(w) for n, w in weights.items()} for _ in range(2)
        )

    def select(self, lanes: Tensor) -> None:
        """Go on with some of the lanes (their indices)."""
        self.reader = self.reader.select(lanes)
        self.spare, self.other = (
            {n: w[: len(lanes)] for n, w in some.items()} for some in (self.spare, self.other)
        )

    def read(self, segment: Segment) -> _Heard:
        """Predict a segment, then learn from it."""
        now = step(self.base, self.rule, self.reader, segment, self.spare)
        now.give(self.reader)
        self.reader = now.after
        self.spare, self.other = self.other, self.spare
        flushed = now.flushed.nonzero().flatten().tolist()
        return _Heard(now.scored.nll, now.scored.output, flushed)


def score_articles(
    base: AdaptationBase,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    lanes: int,
    title: str | None = None,
    cache: Sequence[CacheSetting] = (),
) -> Scores:
    """Read every article once, predict -> score -> update; `rule` None = static.

    Each article starts from theta_0, a zero state and an empty cache, so the result does not
    depend on the number of lanes. `title` shows a progress bar; `cache` names the neural caches to
    put on top of the same reading.
    """
    filled = sum(len(a) > 0 for a in articles)
    columns = [[np.zeros(len(a)) for a in articles] for _ in range(1 + len(cache))]
    flushes: list[tuple[int, int]] = []
    if not filled:
        return _scores(columns, 0.0, 0.0, flushes)
    device = base.weights[base.dynamic[0]].device
    stream = LaneStream(articles, min(lanes, filled), base.segment, eos)
    readers = _Static(base, stream.lanes) if rule is None else _Adapting(base, rule, stream.lanes)
    caches: Cache | None = None
    clock, mixing = time.perf_counter(), 0.0
    tokens = sum(len(a) for a in articles)
    with tqdm(total=tokens, desc=title, unit="tok", unit_scale=True, disable=title is None) as bar:
        lanes_left = np.arange(stream.lanes)
        for full in stream:
            busy = full.article[lanes_left] >= 0
            if not busy.all():  # lanes without a next article: nothing to compute there any more
                keep = torch.from_numpy(np.flatnonzero(busy)).to(device)
                lanes_left = lanes_left[busy]
                readers.select(keep)
                caches = caches.select(keep) if caches else None
            raw = full.select(lanes_left)
            segment = raw.to(device)
            now = readers.read(segment)
            counts = raw.mask.sum(1).tolist()
            _keep(columns[0], now.nll, raw, counts)  # the device is waited for here
            if cache:
                pause = time.perf_counter()
                caches = caches or Cache(cache, now.output)
                mixed = caches.mix(now.nll, now.output, segment)
                for column, nll in zip(columns[1:], mixed, strict=True):
                    _keep(column, nll, raw, counts)
                mixing += time.perf_counter() - pause
            flushes += [(int(raw.article[k]), int(raw.start[k])) for k in now.flushed]
            bar.update(sum(counts))
    buffers.clear()
    return _scores(columns, time.perf_counter() - clock, mixing, flushes)


def _keep(column: list[np.ndarray], nll_BM: Tensor, segment: Segment, counts: list[int]) -> None:
    """Write a segment's losses where they belong; `counts` are its tokens, lane by lane."""
    rows = nll_BM.double().cpu().numpy()
    for lane, count in enumerate(counts):
        if count:
            at = segment.start[lane]
            column[segment.article[lane]][at : at + count] = rows[lane, :count]


def _scores(
    columns: list[list[np.ndarray]], seconds: float, mixing: float, flushes: list[tuple[int, int]]
) -> Scores:
    """The model's own losses (the first column), and those with each cache.

    The caches' share `mixing` of the seconds is theirs alone.
    """
    nll, *mixed = columns
    cached = [Scores(m, seconds, flushes, []) for m in mixed]
    return Scores(nll, seconds - mixing, flushes, cached)


def score_stream(
    base: AdaptationBase,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    title: str | None = None,
    cache: Sequence[CacheSetting] = (),
) -> Scores:
    """Read the articles as one long text in which weights, state and cache are never reset."""
    whole = score_articles(base, rule, [np.concatenate(list(articles))], eos, 1, title, cache)
    ends = np.cumsum([len(a) for a in articles])
    columns = [np.split(s.nll[0], ends[:-1]) for s in (whole, *whole.cached)]
    flushes = []
    for _, at in whole.flushes:
        article = int(np.searchsorted(ends, at, side="right"))
        flushes.append((article, at - int(ends[article]) + len(articles[article])))
    both = whole.cached[0].seconds if whole.cached else whole.seconds
    return _scores(columns, both, both - whole.seconds, flushes)


def read_in(base: AdaptationBase, protocol: str) -> AdaptationBase:
    """The long-term memory as a protocol reads with it: in `article` borders are marked, and nobody
    looks for them."""
    return dataclasses.replace(base, borders=None) if protocol == "article" else base


def score_protocol(
    base: AdaptationBase,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    protocol: str,
    lanes: int,
    title: str | None = None,
    cache: Sequence[CacheSetting] = (),
) -> Scores:
    """`score_articles` or `score_stream` by the protocol's name; see `read_in`."""
    base = read_in(base, protocol)
    if protocol == "stream":
        return score_stream(base, rule, articles, eos, title, cache)
    return score_articles(base, rule, articles, eos, lanes, title, cache)


def word_losses(nll: np.ndarray, tokens: np.ndarray, starts_word: np.ndarray) -> np.ndarray:
    """Sum the losses of the tokens of every word: float64 (words,)."""
    if not len(tokens):
        return np.zeros(0)
    first = starts_word[tokens].copy()
    first[0] = True
    return np.add.reduceat(nll, np.flatnonzero(first))


def check_finite(scores: Scores, rule: str, protocol: str, titles: Sequence[str]) -> None:
    """Refuse losses that are not numbers.

    Raises:
        UserError: names rule, protocol, article, token and the way out.
    """
    for title, nll in zip(titles, scores.nll, strict=True):
        bad = np.flatnonzero(~np.isfinite(nll))
        if len(bad):
            raise UserError(
                f"rule {rule}, protocol {protocol}: the loss is {nll[bad[0]]} at token {bad[0]} of "
                f"article {title!r}; its weights diverged. Use a smaller step size "
                "(--meta.learning-rate, or tune again with a larger --budget)"
            )


@torch.no_grad()
def static_loss(
    weights: Weights,
    shape: BaseModel,
    text: Text,
    lanes: int,
    segment: int,
    precision: torch.dtype = torch.float32,
) -> float:
    """Mean loss in nats per token of `text` under fixed weights, state reset at borders.

    N-grams among the weights are read with.
    """
    device = weights["embedding"].device
    stream = LaneStream(text.articles, min(lanes, len(text.articles)), segment, text.eos)
    state = shape.initial_state(stream.lanes, device)
    ngrams, trail = ngrams_of(weights), Trail.begin(stream.lanes, device)
    total, tokens = 0.0, 0
    for raw in stream:
        piece = raw.to(device)
        state = state.keep(~piece.new)
        if ngrams is not None:
            rows, trail = ngrams.follow(trail, piece.inputs, piece.new)
            weights = {**weights, SAID: ngrams.said(rows)}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            now = shape.read(weights, piece.inputs, piece.targets, state)
        state = now.state
        total += float((now.nll * piece.mask).sum())
        tokens += int(piece.mask.sum())
    return total / tokens
