"""N-gram embeddings: what training text taught of its most frequent n-grams, in the model.

What an article taught behind a context is held in rows that are zero when it begins
(`mlm.extensions.ngram_memory`). Here are rows of the corpus: each of the N contexts c of one to
four tokens that are the most frequent in the training text has a row M[c] (E), which all lanes
share, and tokens are predicted with

    logits_t = output layer(h_t + sum_k M[c_k(t)] + ...),   c_k(t): the last k tokens.

M starts at zero and learns in stage 1, from the gradient g_s of a token's loss under all that its
lane has learned by then: where lanes adapt, it comes to hold what articles have in common, and not
what each of them teaches anyway; without adaptation all of it.

    M[c] -= min(eta / (n_0 + n(c))^a, d / r(c)) g_s / w,

n(c) being how often c was read so far, r(c) how often in this step of all lanes, and w the mean
square length of the output embedding's rows. Steps fall with the visits (Robbins and Monro 1951),
but for a < 1 slowly enough for a row to reach its optimum; what comes often moves by d times its
mean gradient at most. Contexts are known by fingerprints of 64 bits, so that no two share a row as
in hashed n-gram embeddings (Svenstrup et al. 2017). They are part of the language model: static
reading and hand-made rules read with them, too.

Letters: B lanes, T tokens, C columns, N contexts, E width of what the softmax sees, K orders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.extensions.ngram_memory import inverse_square_length
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Extent, Need, Outcome, Plan, Told
from mlm.models.language_model import Weights
from mlm.text.streams import Segment, Text

LENGTHS = (1, 2, 3, 4)
"""k: tokens of context."""
LONGEST = LENGTHS[-1]
STEP, AFTER, POWER, MOST_OF_MEAN = 2.0, 4.0, 0.6, 0.5
"""eta, n_0, a and d."""
FACTOR = 6364136223846793005
"""Of fingerprints, an odd number of 63 bits."""
Tokens = TypeVar("Tokens", Tensor, np.ndarray)


def context_keys(tokens: Sequence[Tokens]) -> Tokens:
    """Fingerprints of contexts, given as their first tokens, their second tokens, ...: int64."""
    found = tokens[0] * 0 + len(tokens)
    for these in tokens:
        found = found * FACTOR + these + 1
    return found


class Trail(NamedTuple):
    """What lanes read last, as far back as contexts reach: a value."""

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

    def opened(self, reset_B: Tensor) -> Trail:
        """Nothing is known in these lanes."""
        return self._replace(inside=self.inside & ~reset_B.unsqueeze(1))

    def line(self, inputs_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with a segment behind them, and which of all these are the article's."""
        inside = F.pad(self.inside, (0, inputs_BT.shape[1]), value=True)
        return torch.cat([self.tokens, inputs_BT], 1), inside

    def behind(self, inputs_BT: Tensor, taught_BT: Tensor | None = None) -> Trail:
        """The trail behind a segment; what precedes a lane's first taught token is forgotten."""
        line, inside = self.line(inputs_BT)
        if taught_BT is not None:
            first_B1 = taught_BT.int().argmax(1, keepdim=True)
            at = torch.arange(1 - LONGEST, inputs_BT.shape[1], device=inside.device)
            inside = inside & ((at >= first_B1) | (first_B1 == 0))
        return Trail(line[:, 1 - LONGEST :], inside[:, 1 - LONGEST :])

    def tensors(self) -> list[Tensor]:
        """All of it, for files."""
        return list(self)

    def of(self, tensors: Sequence[Tensor]) -> Trail:
        """The trail made of such `tensors`."""
        return Trail(*tensors)


class NGrams(NamedTuple):
    """The contexts of the corpus, and what it taught behind them."""

    contexts: Tensor
    """(N,) int64: fingerprints, rising."""
    rows: Tensor
    """(N + 1, E): M; the last, for all other contexts, is zero."""

    def find(self, line_BC: Tensor, inside_BC: Tensor, tokens: int) -> Tensor:
        """(B, T, K) int64: which row every context of the line's last T tokens has.

        Args:
            inside_BC: which of the line's tokens belong to the lane's article.
        """
        first, none = line_BC.shape[1] - tokens, len(self.contexts)
        found = []
        for k in LENGTHS:
            starts = range(first - k + 1, first + 1)
            if starts[0] < 0:
                raise ValueError(f"a line of {line_BC.shape[1]} tokens for {tokens} of them")
            key_BT = context_keys([line_BC[:, at : at + tokens] for at in starts])
            row_BT = torch.searchsorted(self.contexts, key_BT).clamp(max=none - 1)
            known = (self.contexts[row_BT] == key_BT) & inside_BC[:, starts[0] :][:, :tokens]
            found.append(row_BT.masked_fill(~known, none))
        return torch.stack(found, -1)

    def rows_of(self, trail: Trail, inputs_BT: Tensor) -> Tensor:
        """(B, T, K): which rows a segment's contexts have, see `find`."""
        return self.find(*trail.line(inputs_BT), inputs_BT.shape[1])

    def said(self, rows_BTK: Tensor) -> Tensor:
        """(B, T, E): the sum of these rows."""
        flat = F.embedding_bag(rows_BTK.flatten(0, 1), self.rows, mode="sum")
        return flat.view(*rows_BTK.shape[:2], -1)


def most_frequent(articles: Sequence[np.ndarray], eos: int, number: int) -> Tensor:
    """Fingerprints (N,), rising, of the contexts that come most often, N <= number.

    Every article is read behind `eos`, as a lane reads it; no context reaches over its beginning.
    A long text is gone through several times, each time for some of the contexts, about
    `buffers.NUMBERS` of them.
    """
    tokens = sum(map(len, articles))
    parts = 1 << max(0, math.ceil(math.log2(max(1, tokens / buffers.NUMBERS))))
    keys, counts = [], []
    for k in LENGTHS:
        some = [_counted(articles, eos, k, part, parts) for part in range(parts)]
        found, times = (np.concatenate(column) for column in zip(*some, strict=True))
        most = np.lexsort((found, -times))[:number]
        keys.append(found[most])
        counts.append(times[most])
    order = np.argsort(-np.concatenate(counts), kind="stable")[:number]
    return torch.from_numpy(np.sort(np.concatenate(keys)[order]))


def _counted(
    articles: Sequence[np.ndarray], eos: int, k: int, part: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints of the contexts of k tokens, and how often each comes: of one of so many parts,
    a power of two."""
    own = []
    for batch in _batches(articles):
        line = np.concatenate([x for a in batch for x in ([eos], a[:-1])]).astype(np.int64)
        lengths = np.array([max(1, len(a)) for a in batch])
        place = np.arange(len(line)) - np.repeat(lengths.cumsum() - lengths, lengths)
        every = context_keys([line[at : len(line) - k + 1 + at] for at in range(k)])
        every = every[place[k - 1 :] >= k - 1]
        own.append(every[((every * FACTOR) >> 40) & (parts - 1) == part])
    return np.unique(np.concatenate(own), return_counts=True)


def _batches(articles: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The articles in turn, about a million tokens at once."""
    batch: list[np.ndarray] = []
    tokens = 0
    for article in articles:
        batch.append(article)
        tokens += len(article)
        if tokens >= buffers.NUMBERS // 16:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class NGramEmbeddings(Extension):
    """Rows for the training text's most frequent n-grams, learned with the language model."""

    contexts: int = 0
    """Contexts of one to four tokens, the training text's most frequent, behind which stage 1, from
    --lm.init on, as usual or through a learned rule, learns what follows: rows as wide as the
    embedding, added to what the softmax sees; 0 = none."""
    name: ClassVar[str] = "ngram_embeddings"
    of_model: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.contexts > 0

    def problems(self, plan: Plan) -> Sequence[str]:
        """Another language model must have been trained before."""
        if plan.goes_on and plan.through != "rms":
            return ()
        return (
            f"--ngram-embeddings.contexts is {self.contexts}; they are learned by a language model "
            "that goes on from another one (--lm.init), as usual or with --lm.through learned",
        )

    def making(self, text: Extent, corpus: Extent) -> Need:
        """What is counted together, and the rows."""
        counted = min(corpus.text, 2 * buffers.NUMBERS)
        return Need(8 * 6 * counted + self.contexts * (4 * corpus.width + 3 * 8))

    def active(self, weights: Weights) -> bool:
        """Where the language model has learned some."""
        return self.of(weights) is not None

    def of(self, weights: Mapping[str, Tensor]) -> NGrams | None:
        """Those among the weights; None = there are none."""
        if self.key(NGrams._fields[0]) not in weights:
            return None
        return NGrams(*(weights[self.key(name)] for name in NGrams._fields))

    def weights(self, ngrams: NGrams) -> Weights:
        """The inverse of `of`."""
        return {self.key(name): value for name, value in ngrams._asdict().items()}

    def begin(self, base: AdaptationBase, lanes: int) -> Trail:
        """Lanes that have read nothing."""
        return Trail.begin(lanes, base.weights[self.key("contexts")].device)

    def open(self, value: Trail, new_B: Tensor, reset_B: Tensor) -> Trail:
        """Nothing is known where lanes begin again."""
        return value.opened(reset_B)

    @torch.no_grad()
    def before(
        self, weights: Weights, value: Trail, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        """What the corpus says behind these contexts; the note is their rows (B, T, K)."""
        ngrams = self.of(weights)
        assert ngrams is not None
        rows = ngrams.rows_of(value, segment.inputs)
        return told.with_added(ngrams.said(rows)).with_note(self.name, rows)

    def after(
        self, weights: Weights, value: Trail, segment: Segment, note: Tensor, out: Outcome
    ) -> Trail:
        """The trail behind the segment."""
        return value.behind(segment.inputs, None if out.gradient is None else out.taught)

    def with_model(self, text: Text, embedding_VE: Tensor, lanes: int) -> NGramTrainer | None:
        """What stage 1 learns of them."""
        if not self.enabled:
            return None
        contexts = most_frequent(text.articles, text.eos, self.contexts)
        return NGramTrainer(self, contexts, embedding_VE[0], lanes)


class NGramTrainer:
    """N-gram embeddings while stage 1 learns them: written in place (`LearnedWithModel`)."""

    def __init__(
        self, extension: NGramEmbeddings, contexts: Tensor, like_E: Tensor, lanes: int
    ) -> None:
        """All rows zero; they look like (E,)."""
        number = len(contexts) + 1
        rows = like_E.new_zeros(number, len(like_E))
        self.extension, self.ngrams = extension, NGrams(contexts.to(like_E.device), rows)
        self.visits = torch.zeros(number, dtype=torch.int64, device=like_E.device)
        """(N + 1,): n."""
        self.trail = Trail.begin(lanes, like_E.device)
        self.read: Tensor | None = None
        """(B, T, K): rows of the segment that was read last."""

    def added(self, segment: Segment) -> Tensor:
        """See `LearnedWithModel.added`; padding has the rows of no context."""
        trail = self.trail.opened(segment.new)
        rows = self.ngrams.rows_of(trail, segment.inputs)
        self.trail = trail.behind(segment.inputs)
        self.read = rows.masked_fill(~segment.mask.unsqueeze(2), len(self.ngrams.contexts))
        return self.ngrams.said(self.read).requires_grad_()

    def learn(self, gradient_BTE: Tensor, embedding_VE: Tensor) -> None:
        """See `LearnedWithModel.learn`."""
        assert self.read is not None
        self.learn_rows(self.read, gradient_BTE, inverse_square_length(embedding_VE))

    @torch.no_grad()
    def learn_rows(self, rows_BTK: Tensor, gradient_BTE: Tensor, scale: Tensor) -> None:
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
        step_BTK = torch.minimum(step_BTK, MOST_OF_MEAN / (visits_BTK - before_BTK))
        change = step_BTK.unsqueeze(-1) * (gradient_BTE * -scale).unsqueeze(2)
        rows.index_add_(0, flat_BTK, change.flatten(0, 2))
        self.ngrams.rows[none] = 0
        self.visits[none] = 0

    def weights(self) -> Weights:
        """Contexts and rows, by the extension's names."""
        return self.extension.weights(self.ngrams)

    def tensors(self) -> dict[str, Tensor]:
        """Contexts, rows, visits, and what the lanes read last."""
        trail = {f"trail/{name}": t for name, t in self.trail._asdict().items()}
        return {**self.ngrams._asdict(), "visits": self.visits, **trail}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""
        for name, mine in {**self.ngrams._asdict(), "visits": self.visits}.items():
            mine.copy_(tensors[name])
        device = self.visits.device
        self.trail = Trail(*(tensors[f"trail/{name}"].to(device) for name in Trail._fields))
