"""A rule that reads a text: its lanes, its neural cache, what it says of every piece.

Letters: B lanes, M tokens per segment, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.reader.words import SHOWN
from mlm.reading.cache import Cache, CacheSetting
from mlm.reading.lanes import Details, Lanes, Predicted, StaticLanes, details_of
from mlm.text.streams import Segment

CACHED = "cache/"
"""Beginning of the names of a cache's tensors among a memory's."""


class Said(NamedTuple):
    """What a rule says of a segment, on the CPU in float64."""

    nll: np.ndarray
    """(B, M) nats."""
    boundary: np.ndarray
    """(B, M) -log P(the token begins a word), nats."""
    details: list[Details] | None
    """By lane, where they were asked for."""


class Track:
    """Lanes that read under one rule, from where every document begins.

    A value that may be copied; what a copy reads, the others do not notice.
    """

    def __init__(self, lanes: Lanes, cache: tuple[CacheSetting, ...], starts_word: Tensor) -> None:
        """`starts_word`: bool (V,), tokens that begin a word."""
        self.fresh, self.lanes = lanes, lanes
        self.setting, self.starts_word = cache, starts_word
        self.remembers = False
        """Whether a document begins with what was learned before, not at theta_0."""
        self.fresh_cache: Cache | None = None
        self.cache: Cache | None = None

    def copy(self) -> Self:
        """The same track."""
        found = copy.copy(self)
        found.lanes = self.lanes.copy()
        found.cache = self.cache and self.cache.copy()
        return found

    def open(self) -> None:
        """Begin a document."""
        self.lanes = self.fresh.copy()
        self.cache = self.fresh_cache and self.fresh_cache.copy()

    def select(self, lanes: Tensor) -> None:
        """Go on with some of the lanes (their indices)."""
        self.lanes.select(lanes)
        self.cache = self.cache and self.cache.select(lanes)

    def read(self, segment: Segment, details: bool = False) -> Said:
        """Predict a segment, then learn from it."""
        return self._said(*self.learn(segment), segment, details)

    def learn(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """Losses (B, M) and log-probabilities (B, M, V) of a segment, which is learned from."""
        now = self.lanes.read(segment, full=True)
        nll, log_p = self.predicted(now, segment)
        if self.setting and not self.frozen:
            assert self.cache is not None
            self.cache.mix(now.nll, now.output, segment)
        return nll, log_p

    def ahead(self, segment: Segment) -> Tensor:
        """Log-probabilities (B, M, V) of a segment, which leaves no trace."""
        now = self.lanes.ahead(segment)
        return self.predicted(now, segment)[1]

    def predicted(self, now: Predicted, segment: Segment) -> tuple[Tensor, Tensor]:
        """Of what its lanes predict: losses (B, M) and log-probabilities (B, M, V), with the cache,
        which remembers nothing of it."""
        assert now.log_p is not None
        if not self.setting:
            return now.nll, now.log_p
        self.cache = self.cache or Cache(self.setting, now.output)
        (nll,) = self.cache.copy().mix(now.nll, now.output, segment)
        (log_p,) = self.cache.spread(now.log_p, now.output, segment)
        return nll, log_p

    def _said(self, nll: Tensor, log_p: Tensor, segment: Segment, details: bool) -> Said:
        boundary = -log_p[..., self.starts_word].logsumexp(-1)
        found = None
        if details:
            rows = torch.arange(log_p.shape[1], device=log_p.device)
            best = min(SHOWN, log_p.shape[2])
            found = [details_of(*of, rows, best) for of in zip(log_p, segment.targets, strict=True)]
        return Said(nll.double().cpu().numpy(), boundary.double().cpu().numpy(), found)

    # -- what was learned ---------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether nothing is learned any more."""
        return not isinstance(self.lanes, StaticLanes) and self.lanes.frozen

    def freeze(self) -> None:
        """From now on documents are read with what is known now, and teach nothing."""
        if isinstance(self.lanes, StaticLanes):
            return
        self.fresh = self.lanes.copy()
        assert not isinstance(self.fresh, StaticLanes)
        self.fresh.frozen = self.lanes.frozen = True
        self._forget_state()

    def _forget_state(self) -> None:
        """Documents begin with what was learned, but with no hidden state."""
        assert not isinstance(self.fresh, StaticLanes)
        reader = self.fresh.reader
        state = reader.state.keep(torch.zeros_like(reader.rest, dtype=torch.bool))
        self.fresh.reader = reader._replace(state=state)
        self.fresh_cache, self.remembers = self.cache, True

    def memory(self) -> dict[str, Tensor]:
        """What was learned, by name; nothing of the static model."""
        if isinstance(self.lanes, StaticLanes):
            return {}
        found = self.lanes.reader.tensors()
        if self.cache is not None:
            found |= {f"{CACHED}{n}": t for n, t in self.cache.tensors().items()}
        return found

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin every document with a `memory`.

        Raises:
            UserError: it is none of this rule's.
        """
        if isinstance(self.fresh, StaticLanes):
            return
        like = self.fresh.reader
        odd = sorted(like.tensors().keys() - tensors.keys())
        for name, weights in () if odd else like.weights.items():
            found = tensors[f"weights/{name}"]
            if (found.shape, found.dtype) != (weights.shape, weights.dtype):
                odd.append(name)
        if odd:
            raise UserError(
                f"the memory does not fit this rule ({', '.join(odd)}); load it "
                "with the model and the rule that it was saved with"
            )
        self.fresh.begin(like.of(tensors))
        device = self.starts_word.device
        own = {
            n.removeprefix(CACHED): t.to(device) for n, t in tensors.items() if n.startswith(CACHED)
        }
        self.cache = Cache.of(self.setting, own) if own else None
        self._forget_state()
        self.open()
