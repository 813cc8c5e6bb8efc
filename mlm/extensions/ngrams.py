"""Long-term phrases: n-gram embeddings that stage 1 learns.

What an article taught behind a context is held in rows that are zero when it begins
(`mlm.extensions.phrases`). Here is their theta_0: each of the N contexts c of one to four tokens that are the
most frequent in the training text has a row M[c] (E), which all lanes share, and tokens are
predicted with

    logits_t = softmax layer(h_t + sum_k (M[c_k(t)] + m_k[c_k(t)])),   c_k(t): the last k tokens.

M starts at zero and learns as m does, from the gradient g_s of a token's loss under all that its
lane has learned by then: it comes to hold what articles have in common, and not what each of them
teaches anyway. (Without adaptation lanes have learned nothing; M then holds all of it.)

    M[c] -= min(eta / (n_0 + n(c))^a, d / r(c)) g_s / w,

n(c) being how often c was read so far, r(c) how often in this step of all lanes, and w the mean
square length of the output embedding's rows. Steps fall with the visits (Robbins and Monro 1951),
but for a < 1 slowly enough for a row to reach its optimum; what comes often moves by d times its
mean gradient at most. Contexts are known
by fingerprints of 64 bits, so that no two share a row as in hashed n-gram embeddings (Svenstrup et
al. 2017). They are part of the language model: static, or under hand-made rules, which remember no
phrases, it reads with M alone.

Letters: B lanes, T tokens, C columns, N contexts, E width of what the softmax sees, K orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = "phrases.contexts", "phrases.rows"
"""Of `NGrams` among the weights."""


ORDERS = (1, 2, 3, 4)
"""k: tokens of context."""


LONGEST = ORDERS[-1]


STEP, AFTER, POWER, MOST = 2.0, 4.0, 0.6, 0.5
"""eta, n_0, a and d."""


FACTOR = 6364136223846793005
"""Of fingerprints, an odd number of 63 bits."""


Tokens = TypeVar("Tokens", Tensor, np.ndarray)


def fingerprint(tokens: Sequence[Tokens]) -> Tokens:
    """Of contexts, given as their first tokens, their second tokens, ...: int64, modulo 2^64."""
    found = tokens[0] * 0 + len(tokens)
    for these in tokens:
        found = found * FACTOR + these + 1
    return found


class Trail(NamedTuple):
    """What lanes read last, as far back as contexts reach."""

    tokens: Tensor
    """(B, 3) int64."""
    inside: Tensor
    """(B, 3): which of them belong to the lane's article."""

    @classmethod
    def begin(cls, lanes: int, device: torch.device | str = "cpu") -> Trail:
        """Lanes that have read nothing."""
        tokens = torch.zeros(lanes, LONGEST - 1, dtype=torch.int64, device=device)
        return cls(tokens, torch.zeros_like(tokens, dtype=torch.bool))

    def select(self, lanes: Tensor) -> Trail:
        """Some of the lanes (their indices)."""
        return Trail(self.tokens[lanes], self.inside[lanes])


class NGrams(NamedTuple):
    """The contexts of the corpus, and what it taught behind them."""

    contexts: Tensor
    """(N,) int64: fingerprints, rising."""
    rows: Tensor
    """(N + 1, E): M; the last, for all other contexts, is zero."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> NGrams:
        """The same on `device`, optionally with rows of another dtype."""
        return NGrams(self.contexts.to(device), self.rows.to(device, dtype))

    def find(self, line_BC: Tensor, inside_BC: Tensor, tokens: int) -> Tensor:
        """(B, T, K) int64: which row every context of the line's last T tokens has.

        Args:
            inside_BC: which of the line's tokens belong to the lane's article.
        """
        first, none = line_BC.shape[1] - tokens, len(self.contexts)
        found = []
        for k in ORDERS:
            starts = range(first - k + 1, first + 1)
            if starts[0] < 0:
                raise ValueError(f"a line of {line_BC.shape[1]} tokens for {tokens} of them")
            key_BT = fingerprint([line_BC[:, at : at + tokens] for at in starts])
            row_BT = torch.searchsorted(self.contexts, key_BT).clamp(max=none - 1)
            known = (self.contexts[row_BT] == key_BT) & inside_BC[:, starts[0] :][:, :tokens]
            found.append(row_BT.masked_fill(~known, none))
        return torch.stack(found, -1)

    def follow(self, trail: Trail, inputs_BT: Tensor, new_B: Tensor) -> tuple[Tensor, Trail]:
        """Which rows a segment's contexts have, see `find`, and the trail behind it.

        Args:
            new_B: lanes in which it opens an article.
        """
        line = torch.cat([trail.tokens, inputs_BT], 1)
        mine = trail.inside & ~new_B.unsqueeze(1)
        inside = F.pad(mine, (0, inputs_BT.shape[1]), value=True)
        after = Trail(*(t[:, 1 - LONGEST :] for t in (line, inside)))
        return self.find(line, inside, inputs_BT.shape[1]), after

    def said(self, rows_BTK: Tensor) -> Tensor:
        """(B, T, E): the sum of these rows."""
        flat = F.embedding_bag(rows_BTK.flatten(0, 1), self.rows, mode="sum")
        return flat.view(*rows_BTK.shape[:2], -1)

    def tensors(self) -> dict[str, Tensor]:
        """For files: as they are named among the weights."""
        return dict(zip(NAMES, self, strict=True))


def ngrams_of(weights: Mapping[str, Tensor]) -> NGrams | None:
    """Those among the weights of a language model."""
    return NGrams(*(weights[n] for n in NAMES)) if NAMES[0] in weights else None


def most_frequent(articles: Sequence[np.ndarray], eos: int, number: int) -> Tensor:
    """Fingerprints (N,), rising, of the contexts that come most often, N <= number.

    Every article is read behind `eos`, as a lane reads it; no context reaches over its beginning.
    """
    line = np.concatenate([part for a in articles for part in ([eos], a[:-1])]).astype(np.int64)
    lengths = np.array([max(1, len(a)) for a in articles])
    place = np.arange(len(line)) - np.repeat(lengths.cumsum() - lengths, lengths)
    keys, counts = [], []
    for k in ORDERS:
        every = fingerprint([line[at : len(line) - k + 1 + at] for at in range(k)])
        found, times = np.unique(every[place[k - 1 :] >= k - 1], return_counts=True)
        most = np.argsort(-times, kind="stable")[:number]
        keys.append(found[most])
        counts.append(times[most])
    order = np.argsort(-np.concatenate(counts), kind="stable")[:number]
    return torch.from_numpy(np.sort(np.concatenate(keys)[order]))


class Learning(NamedTuple):
    """N-gram embeddings that are learned: written in place."""

    ngrams: NGrams
    visits: Tensor
    """(N + 1,) int64: n."""

    @classmethod
    def begin(cls, contexts: Tensor, like: Tensor) -> Learning:
        """All rows zero; they look like (E,)."""
        number = len(contexts) + 1
        rows = like.new_zeros(number, len(like))
        visits = torch.zeros(number, dtype=torch.int64, device=like.device)
        return cls(NGrams(contexts.to(like.device), rows), visits)

    @torch.no_grad()
    def learn(self, rows_BTK: Tensor, gradient_BTE: Tensor, scale: Tensor) -> None:
        """Tokens read where these contexts were.

        Args:
            rows_BTK: see `NGrams.find`; a token that does not teach has those of no context.
            gradient_BTE: of the sum of their nll by what the softmax saw.
            scale: (E,), 1 / w.
        """
        none = len(self.ngrams.contexts)
        flat_BTK, rows = rows_BTK.flatten(), self.ngrams.rows
        before_BTK = self.visits[rows_BTK]
        self.visits.index_add_(0, flat_BTK, torch.ones_like(flat_BTK))
        visits_BTK = self.visits[rows_BTK]
        step_BTK = STEP * (AFTER + visits_BTK.to(rows.dtype)) ** -POWER
        step_BTK = torch.minimum(step_BTK, MOST / (visits_BTK - before_BTK))
        change = step_BTK.unsqueeze(-1) * (gradient_BTE * -scale).unsqueeze(2)
        rows.index_add_(0, flat_BTK, change.flatten(0, 2))
        self.ngrams.rows[none] = 0
        self.visits[none] = 0

    def tensors(self) -> dict[str, Tensor]:
        """For files."""
        return {**self.ngrams.tensors(), "phrases.visits": self.visits}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
