"""Score articles under an update rule, in protocol `article` or `stream`; words from tokens.

Letters: B lanes, A articles, M tokens per segment, E width of what the softmax sees, V vocabulary,
K likeliest tokens.
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
from mlm.reading.lanes import Details, details_of, lanes_under
from mlm.rules.protocol import Bound
from mlm.text.streams import LaneStream, Segment


class Wanted(NamedTuple):
    """Tokens of which more than the loss is wanted."""

    at: Sequence[np.ndarray]
    """Their places in every article, rising."""
    best: int
    """K, at most V."""


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
    details: Sequence[Details] = ()
    """Per article: of the tokens that are `Wanted`, if any are."""

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
    wanted: Wanted | None = None,
) -> Scores:
    """Read every article once, predict -> score -> update; `rule` None = static.

    Each article starts from theta_0, a zero state and an empty cache, so the result does not
    depend on the number of lanes, nor on that of processes (`mlm.base.processes`), among which
    several articles are dealt, the longest first. `title` shows a progress bar; `cache` names the
    neural caches to put on top of the same reading. What is `wanted` of tokens changes no loss, but
    takes time and memory: log-probabilities (B, M, V) of the segments that hold them.
    """
    here = ranks()
    if here.world == 1 or len(articles) == 1:
        return _score(base, rule, articles, eos, lanes, title, cache, wanted)
    mine = here.mine([len(a) for a in articles])
    own = [articles[a] for a in mine]
    some = wanted and Wanted([wanted.at[a] for a in mine], wanted.best)
    found = here.parts(lambda: (mine, _score(base, rule, own, eos, lanes, title, cache, some)))
    return _put_together(found, len(articles))


def _put_together(parts: Sequence[tuple[list[int], Scores]], number: int) -> Scores:
    """The scores of all articles from those of every process's own; the slowest one's seconds."""
    nll = [np.zeros(0)] * number
    details: dict[int, Details] = {}
    for places, scores in parts:
        for place, own in zip(places, scores.nll, strict=True):
            nll[place] = own
        details |= zip(places, scores.details, strict=False)
    flushes = sorted((places[a], at) for places, scores in parts for a, at in scores.flushes)
    every = zip(*(scores.cached for _, scores in parts), strict=True)
    cached = [
        _put_together([(own, one) for (own, _), one in zip(parts, ones, strict=True)], number)
        for ones in every
    ]
    seconds = max(scores.seconds for _, scores in parts)
    return Scores(nll, seconds, flushes, cached, [details[a] for a in sorted(details)])


class _Details:
    """The details of the tokens wanted, in every column of losses, as segments are read."""

    def __init__(self, wanted: Wanted | None, columns: int) -> None:
        self.wanted = wanted or Wanted([], 0)
        self.parts: list[list[list[Details]]] = [
            [[] for _ in self.wanted.at] for _ in range(columns)
        ]

    def in_segment(self, segment: Segment, counts: list[int]) -> list[tuple[int, np.ndarray]]:
        """Lane by lane: the article, and the rows of (B * M) that are wanted of it, if any."""
        found, steps = [], segment.inputs.shape[1]
        for lane, count in enumerate(counts if self.wanted.at else ()):
            article, start = segment.article[lane], segment.start[lane]
            at = self.wanted.at[article]
            first, end = np.searchsorted(at, (start, start + count))
            if first < end:
                found.append((int(article), lane * steps + at[first:end] - start))
        return found

    def add(
        self, rows: list[tuple[int, np.ndarray]], log_p: Sequence[Tensor], targets_BM: Tensor
    ) -> None:
        """Keep the details of a segment's rows; `log_p` (B, M, V) of every column."""
        every = torch.from_numpy(np.concatenate([own for _, own in rows])).to(targets_BM.device)
        ends = np.cumsum([len(own) for _, own in rows])
        for column, log_p_BMV in zip(self.parts, log_p, strict=True):
            flat = log_p_BMV.flatten(0, 1), targets_BM.flatten()
            found = details_of(*flat, every, self.wanted.best)
            parts = zip(*(np.split(part, ends[:-1]) for part in found), strict=True)
            for (article, _), part in zip(rows, parts, strict=True):
                column[article].append(Details(*part))

    def by_column(self) -> list[list[Details]]:
        """Column by column, article by article."""
        numbers, places = np.zeros(0, np.float32), np.zeros(0, np.int64)
        shape = 0, self.wanted.best
        none = Details(numbers, places, places, places.reshape(shape), numbers.reshape(shape))
        return [[joined_details(parts or [none]) for parts in column] for column in self.parts]


def joined_details(parts: Sequence[Details]) -> Details:
    """The details of tokens, part after part."""
    return Details(*map(np.concatenate, zip(*parts, strict=True)))


def _score(
    base: AdaptationBase,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    lanes: int,
    title: str | None,
    cache: Sequence[CacheSetting],
    wanted: Wanted | None,
) -> Scores:
    """What `score_articles` does, in one process."""
    filled = sum(len(a) > 0 for a in articles)
    columns = [[np.zeros(len(a)) for a in articles] for _ in range(1 + len(cache))]
    flushes: list[tuple[int, int]] = []
    details = _Details(wanted, len(columns))
    if not filled:
        return _scores(columns, details.by_column(), 0.0, 0.0, flushes)
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
            segment, counts = raw.to(device), raw.mask.sum(1).tolist()
            rows = details.in_segment(raw, counts)
            now = readers.read(segment, full=bool(rows))
            log_p = [] if now.log_p is None else [now.log_p]
            _keep(columns[0], now.nll, raw, counts)  # the device is waited for here
            if cache:
                pause = time.perf_counter()
                caches = caches or Cache(cache, now.output)
                log_p += [x for p in log_p for x in caches.spread(p, now.output, segment)]
                mixed = caches.mix(now.nll, now.output, segment)
                for column, nll in zip(columns[1:], mixed, strict=True):
                    _keep(column, nll, raw, counts)
                mixing += time.perf_counter() - pause
            if rows:
                details.add(rows, log_p, segment.targets)
            flushes += [(int(raw.article[k]), int(raw.start[k])) for k in now.flushed]
            bar.update(sum(counts))
    buffers.clear()
    return _scores(columns, details.by_column(), time.perf_counter() - clock, mixing, flushes)


def _keep(column: list[np.ndarray], nll_BM: Tensor, segment: Segment, counts: list[int]) -> None:
    """Write a segment's losses where they belong; `counts` are its tokens, lane by lane."""
    rows = nll_BM.double().cpu().numpy()
    for lane, count in enumerate(counts):
        if count:
            at = segment.start[lane]
            column[segment.article[lane]][at : at + count] = rows[lane, :count]


def _scores(
    columns: list[list[np.ndarray]],
    details: Sequence[Sequence[Details]],
    seconds: float,
    mixing: float,
    flushes: list[tuple[int, int]],
) -> Scores:
    """The model's own losses (the first column), and those with each cache.

    The caches' share `mixing` of the seconds is theirs alone.
    """
    own, *mixed = zip(columns, details, strict=True)
    cached = [Scores(nll, seconds, flushes, [], found) for nll, found in mixed]
    return Scores(own[0], seconds - mixing, flushes, cached, own[1])


def score_stream(
    base: AdaptationBase,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    title: str | None = None,
    cache: Sequence[CacheSetting] = (),
    wanted: Wanted | None = None,
) -> Scores:
    """Read the articles as one long text in which weights, state and cache are never reset."""
    ends = np.cumsum([len(a) for a in articles])
    text, some = [np.concatenate(list(articles))], wanted
    if wanted:
        begins = ends - [len(a) for a in articles]
        at = [own + begin for own, begin in zip(wanted.at, begins, strict=True)]
        some = Wanted([np.concatenate(at)], wanted.best)
    whole = score_articles(base, rule, text, eos, 1, title, cache, some)
    columns = [np.split(s.nll[0], ends[:-1]) for s in (whole, *whole.cached)]
    flushes = []
    for _, at in whole.flushes:
        article = int(np.searchsorted(ends, at, side="right"))
        flushes.append((article, at - int(ends[article]) + len(articles[article])))
    both = whole.cached[0].seconds if whole.cached else whole.seconds
    details: list[list[Details]] = [[] for _ in columns]
    if wanted:
        cuts = np.cumsum([len(own) for own in wanted.at])[:-1]
        for column, scores in zip(details, (whole, *whole.cached), strict=True):
            parts = (np.split(part, cuts) for part in scores.details[0])
            column += [Details(*own) for own in zip(*parts, strict=True)]
    return _scores(columns, details, both, both - whole.seconds, flushes)


def score_protocol(
    base: AdaptationBase,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    protocol: str,
    lanes: int,
    title: str | None = None,
    cache: Sequence[CacheSetting] = (),
    wanted: Wanted | None = None,
) -> Scores:
    """`score_articles` or `score_stream`, by the protocol's name."""
    base = base.for_protocol(protocol)
    if protocol == "stream":
        return score_stream(base, rule, articles, eos, title, cache, wanted)
    return score_articles(base, rule, articles, eos, lanes, title, cache, wanted)


def word_losses(nll: np.ndarray, tokens: np.ndarray, starts_word: np.ndarray) -> np.ndarray:
    """Sum the losses of the tokens of every word: float64 (words,)."""
    if not len(tokens):
        return np.zeros(0)
    return np.add.reduceat(nll, first_tokens(tokens, starts_word))


def first_tokens(tokens: np.ndarray, starts_word: np.ndarray) -> np.ndarray:
    """The place of every word's first token: int64 (words,)."""
    first = starts_word[tokens]
    first[:1] = True
    return np.flatnonzero(first)


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
