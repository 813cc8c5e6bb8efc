"""B lanes of article segments: inputs, targets, mask, new-article flag; a resumable cursor.

Each lane reads one article at a time, M tokens per segment, and takes the next article of the
queue when it is through. The first token of an article is predicted from `<eos>`.
Letters: B lanes, M tokens per segment, A articles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segment(NamedTuple):
    """One segment of every lane."""

    inputs: Tensor
    """Token ids (B, M), int64; padding after an article's end is `<eos>`."""
    targets: Tensor
    """The tokens to predict (B, M)."""
    mask: Tensor
    """(B, M) bool: True where a token counts."""
    new: Tensor
    """(B,) bool: the segment opens an article."""
    article: np.ndarray
    """(B,) article index, -1 for an idle lane."""
    start: np.ndarray
    """(B,) position of the segment's first target in its article, in tokens."""

    def select(self, lanes: np.ndarray) -> Segment:
        """The segment of some lanes (their indices)."""
        if len(lanes) == len(self.article):
            return self
        index = torch.from_numpy(lanes)
        inputs, targets = self.inputs[index], self.targets[index]
        mask, new = self.mask[index], self.new[index]
        return Segment(inputs, targets, mask, new, self.article[lanes], self.start[lanes])

    def to(self, device: torch.device) -> Segment:
        """The same segment with its tensors on `device`."""
        return self._replace(
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
            mask=self.mask.to(device),
            new=self.new.to(device),
        )


_NOISE = 16
"""Mean length of a run of noise, in tokens."""


def with_noise(
    segment: Segment, pool: np.ndarray, share: float, generator: np.random.Generator
) -> Segment:
    """The segment with about `share` of its tokens overwritten by random ones of `pool`.

    They come in runs of random length, as words of an unknown script do.
    """
    targets, inputs = segment.targets.numpy().copy(), segment.inputs.numpy().copy()
    noise = np.zeros(targets.shape, dtype=bool)
    for lane, at in np.argwhere(generator.random(targets.shape) < share / _NOISE):
        noise[lane, at : at + generator.geometric(1 / _NOISE)] = True
    noise &= segment.mask.numpy()
    targets[noise] = generator.choice(pool, int(noise.sum()))
    inputs[:, 1:] = np.where(noise[:, :-1], targets[:, :-1], inputs[:, 1:])
    return segment._replace(inputs=torch.from_numpy(inputs), targets=torch.from_numpy(targets))


@dataclass
class LaneStream:
    """Articles dealt to lanes from a queue; iterate for segments.

    Args:
        articles: token arrays, one per article (empty ones are skipped).
        lanes, segment: B and M.
        eos: id that precedes an article's first token.
        seed: shuffles the queue anew in every epoch (training, endless); None = longest first,
            one pass (evaluation: the lanes then end at about the same time).
    The cursor (`state_dict`) continues the very same segments.
    """

    articles: Sequence[np.ndarray]
    lanes: int
    segment: int
    eos: int
    seed: int | None = None
    queue: np.ndarray = field(init=False)
    epoch: int = field(init=False, default=0)
    taken: int = field(init=False, default=0)
    current: np.ndarray = field(init=False)
    position: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.array([len(a) for a in self.articles], dtype=np.int64)
        if not (self.lengths > 0).any():
            raise ValueError("no article holds a token")
        self.queue = self._order()
        self.current = np.full(self.lanes, -1, dtype=np.int64)
        self.position = np.zeros(self.lanes, dtype=np.int64)

    def _order(self) -> np.ndarray:
        filled = np.flatnonzero(self.lengths)
        if self.seed is None:
            return filled[np.argsort(-self.lengths[filled], kind="stable")]
        return np.random.default_rng([self.seed, self.epoch]).permutation(filled)

    def _take(self, lane: int) -> bool:
        """Give `lane` the next article; False when the queue is through (evaluation only)."""
        if self.taken == len(self.queue):
            if self.seed is None:
                self.current[lane] = -1
                return False
            self.epoch += 1
            self.queue, self.taken = self._order(), 0
        self.current[lane] = self.queue[self.taken]
        self.taken += 1
        self.position[lane] = 0
        return True

    def __iter__(self) -> LaneStream:
        return self

    def __next__(self) -> Segment:
        shape = (self.lanes, self.segment)
        inputs = np.full(shape, self.eos, dtype=np.int64)
        targets = np.full(shape, self.eos, dtype=np.int64)
        mask = np.zeros(shape, dtype=bool)
        new = np.zeros(self.lanes, dtype=bool)
        start = np.zeros(self.lanes, dtype=np.int64)
        for lane in range(self.lanes):
            done = self.current[lane] < 0 or (
                self.position[lane] >= self.lengths[self.current[lane]]
            )
            if done:
                new[lane] = self._take(lane)
                if not new[lane]:
                    continue
            text = self.articles[self.current[lane]]
            at = self.position[lane]
            piece = np.asarray(text[at : at + self.segment], dtype=np.int64)
            size = len(piece)
            targets[lane, :size] = piece
            inputs[lane, 1:size] = piece[:-1]
            inputs[lane, 0] = text[at - 1] if at else self.eos
            mask[lane, :size] = True
            start[lane] = at
            self.position[lane] = at + size
        if not mask.any():
            raise StopIteration
        return Segment(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(mask),
            torch.from_numpy(new),
            self.current.copy(),
            start,
        )

    def state_dict(self) -> dict[str, list[int]]:
        """The cursor as plain integers."""
        return {
            "epoch": [self.epoch],
            "taken": [self.taken],
            "current": self.current.tolist(),
            "position": self.position.tolist(),
        }

    def load_state_dict(self, cursor: dict[str, list[int]]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: it is no cursor of these articles and lanes.
        """
        self.epoch, self.taken = cursor["epoch"][0], cursor["taken"][0]
        self.queue = self._order()
        self.current = np.array(cursor["current"], dtype=np.int64)
        self.position = np.array(cursor["position"], dtype=np.int64)
        lanes = {self.current.shape, self.position.shape} == {(self.lanes,)}
        known = lanes and self.current.min() >= -1 and self.current.max() < len(self.lengths)
        if not known or self.position.min() < 0 or not 0 <= self.taken <= len(self.queue):
            raise ValueError("no cursor of these articles")


@dataclass(frozen=True)
class Text:
    """What a stage reads: token arrays of articles and how many words they hold."""

    articles: Sequence[np.ndarray]
    words: int
    eos: int
    spelling: float = 0.0
    """Nats that the spellings of unknown words cost, besides all losses."""
    noise: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Tokens that stage 1 draws noise from (`Vocabulary.noise`)."""

    def word_perplexity(self, loss: float) -> float:
        """Perplexity per word at a loss in nats per token, at most e**50."""
        return math.exp(min(50.0, (loss * self.tokens + self.spelling) / self.words))

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(a) for a in self.articles)

    @property
    def tokens_per_word(self) -> float:
        """Turns nats per token into nats per word."""
        return self.tokens / self.words


class MixedLanes:
    """Held-out articles in lanes: some reset at every border, some one long text each."""

    def __init__(
        self, text: Text, lanes: int, stream_share: float, segment: int, seed: int
    ) -> None:
        self.long = round(lanes * stream_share)
        self.parts: list[LaneStream] = []
        if self.long < lanes:
            self.parts.append(LaneStream(text.articles, lanes - self.long, segment, text.eos, seed))
        if self.long:
            filled = [np.asarray(a) for a in text.articles if len(a)]
            order = np.random.default_rng([seed, 1]).permutation(len(filled))
            # With fewer articles than lanes every lane still gets a text of its own.
            need = max(len(order), self.long)
            order = np.resize(order, need)
            texts = [
                np.concatenate([filled[a] for a in order[k :: self.long]]) for k in range(self.long)
            ]
            self.parts.append(LaneStream(texts, self.long, segment, text.eos, seed))

    def __iter__(self) -> Iterator[Segment]:
        while True:
            yield self.next()

    def next(self) -> Segment:
        """The next segment of every lane."""
        pieces = [next(part) for part in self.parts]
        if len(pieces) == 1:
            return pieces[0]
        columns = list(zip(*pieces, strict=True))
        inputs, targets, mask, new = (torch.cat(column) for column in columns[:4])
        article, start = (np.concatenate(column) for column in columns[4:])
        return Segment(inputs, targets, mask, new, article, start)

    def state_dict(self) -> list[dict[str, list[int]]]:
        """The cursors as plain integers."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, cursors: list[dict[str, list[int]]]) -> None:
        """Continue where `state_dict` was taken."""
        for part, cursor in zip(self.parts, cursors, strict=True):
            part.load_state_dict(cursor)
