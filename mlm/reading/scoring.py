"""Score articles under an update rule, in protocol `article` or `stream`; words from tokens.

Letters: B lanes, A articles, M tokens per segment, E width of what the softmax sees.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.processes import ranks
from mlm.base.terminal import progress_bar
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.reading.cache import Cache, CacheSetting
from mlm.reading.lanes import lanes_under
from mlm.rules.protocol import Bound
from mlm.text.streams import LaneStream, Segment


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


def busy_segments(stream: LaneStream) -> Iterator[tuple[Segment, Tensor | None]]:
    """The segments of the lanes that still read.

    With each come the places, among the lanes before, of those that go on, where some have no next
    article; None = all go on.
    """
    lanes_left = np.arange(stream.lanes)
    for full in stream:
        busy = full.article[lanes_left] >= 0
        keep = None if busy.all() else torch.from_numpy(np.flatnonzero(busy))
        lanes_left = lanes_left[busy]
        yield full.select(lanes_left), keep


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
    depend on the number of lanes, nor on that of processes (`mlm.base.processes`), among which
    several articles are dealt, the longest first. `title` shows a progress bar; `cache` names the
    neural caches to put on top of the same reading.
    """
    here = ranks()
    if here.world == 1 or len(articles) == 1:
        return _score(base, rule, articles, eos, lanes, title, cache)
    mine = here.mine([len(a) for a in articles])
    own = [articles[a] for a in mine]
    found = here.parts(lambda: (mine, _score(base, rule, own, eos, lanes, title, cache)))
    return _put_together(found, len(articles))


def _put_together(parts: Sequence[tuple[list[int], Scores]], number: int) -> Scores:
    """The scores of all articles from those of every process's own; the slowest one's seconds."""
    nll = [np.zeros(0)] * number
    for places, scores in parts:
        for place, own in zip(places, scores.nll, strict=True):
            nll[place] = own
    flushes = sorted((places[a], at) for places, scores in parts for a, at in scores.flushes)
    every = zip(*(scores.cached for _, scores in parts), strict=True)
    cached = [
        _put_together([(own, one) for (own, _), one in zip(parts, ones, strict=True)], number)
        for ones in every
    ]
    return Scores(nll, max(scores.seconds for _, scores in parts), flushes, cached)


def _score(
    base: AdaptationBase,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    lanes: int,
    title: str | None,
    cache: Sequence[CacheSetting],
) -> Scores:
    """What `score_articles` does, in one process."""
    filled = sum(len(a) > 0 for a in articles)
    columns = [[np.zeros(len(a)) for a in articles] for _ in range(1 + len(cache))]
    flushes: list[tuple[int, int]] = []
    if not filled:
        return _scores(columns, 0.0, 0.0, flushes)
    device = base.weights[base.dynamic[0]].device
    stream = LaneStream(articles, min(lanes, filled), base.segment, eos)
    readers = lanes_under(base, rule, stream.lanes)
    caches: Cache | None = None
    clock, mixing = time.perf_counter(), 0.0
    tokens = sum(len(a) for a in articles)
    with progress_bar(title or "", tokens, quiet=title is None) as bar:
        for raw, keep in busy_segments(stream):
            if keep is not None:
                readers.select(keep.to(device))
                caches = caches.select(keep.to(device)) if caches else None
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
    """`score_articles` or `score_stream`, by the protocol's name."""
    base = base.for_protocol(protocol)
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
