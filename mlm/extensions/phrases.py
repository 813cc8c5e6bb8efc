"""Phrases: what an article's words taught where the tokens before them were the same.

The weights that every lane rewrites hold little of a phrase seen once. Beside them a lane keeps a
table of n-gram embeddings, zero in theta_0, one row m_k[c] (E) for every context c of k tokens,
k = 1 .. 9, which the output layer reads together with the hidden state,

    logits_t = softmax layer(h_t + sum_k m_k[c_k(t)]),        c_k(t): the last k tokens read,

and whose rows learn by gradient descent as all weights do: after a segment, from the gradient g_s
of every token's loss by what its softmax saw,

    m_k[c_k(s)] -= eta_k / (1 + n_k(s)) g_s / w,

n_k(s) being how often the context had been there (a step that falls with the visits: Robbins and
Monro 1951) and w the mean square length of the static output embedding's rows, so that a token
raises its own logit by about eta_k times its error. Rows are kept in dual form: a lane's last
tokens, their g / w and 1 / (1 + n) are stored, and a row is their sum over earlier places where the
context matches, exactly and without hashing. What was learned behind the last token alone (k = 1)
counts the more, the more alike the hidden states were,

    kappa(s, t) = exp(-ALIKE / 2 |h_s - h_t|^2).

The keys are those of n-gram models and of hashed n-gram embeddings (Svenstrup et al. 2017); that
errors are stored, not words, makes the table fast weights (Schmidhuber 1992) rather than a cache.
Unlike a cache it changes what all other weights learn: a phrase that is remembered leaves them no
error. Where the output layer learns at once (`mlm.extensions.at_once`), phrases do, too: a context that comes
again within the segment moves the logits by -eta_k / (1 + n_k(s)) e_s, what its row would say were
words' embeddings orthogonal. Learned rules read so, and may learn how what is recalled enters the
softmax (`mlm.extensions.read_out`).

Letters: B lanes, T tokens, C tokens stored, E width of what the softmax sees, K orders, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm import kernels
from mlm.extensions.ngrams import LONGEST, NGrams, ngrams_of

ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
"""k: tokens of context."""


STEPS = (1.3, 0.9, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5)
"""eta_k: the best on the tuning words of the benchmark `claim`, as is the next."""


ALIKE = 0.35
"""Of kappa, in units of the hidden state."""


SAID, AGAIN = "softmax.said", "softmax.once.again"
"""Names under which `LanguageModel.read` is given what is added to the hidden state, and where a
context was in the segment before (`Recalled`)."""


@dataclass
class _Book:
    """Tokens of B lanes, appended in columns; only the first `filled` say anything."""

    inputs: Tensor
    """(B, C)."""
    keys: Tensor
    """(B, C, E): hidden states h."""
    values: Tensor
    """(B, C, E): -g / w."""
    rates: Tensor
    """(B, C, K): 1 / (1 + n)."""
    filled: int

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inputs, self.keys, self.values, self.rates


class History(NamedTuple):
    """What lanes have read since their article began: a value.

    The book behind it is shared with the histories it grew from, which only see its beginning;
    who appends to one of those gets a copy.
    """

    book: _Book
    size: int
    """Columns of the book that it sees."""
    since: Tensor
    """(B,) int64: the column with which a lane's article begins."""

    def select(self, lanes: Tensor) -> History:
        """Some of the lanes (their indices)."""
        inputs, keys, values, rates = (t[lanes] for t in self.book.tensors())
        book = _Book(inputs, keys, values, rates, self.size)
        return History(book, self.size, self.since[lanes])

    def opened(self, new_B: Tensor) -> History:
        """Nothing is known in these lanes."""
        since = torch.where(new_B, torch.full_like(self.since, self.size), self.since)
        return self._replace(since=since)

    def line(self, inputs_BT: Tensor, back: int) -> tuple[Tensor, Tensor]:
        """A segment behind the last `back` tokens, and which of all these are the article's, both
        (B, back + T)."""
        first = max(0, self.size - back)
        line = torch.cat([self.book.inputs[:, first : self.size], inputs_BT], 1)
        at = torch.arange(first, first + line.shape[1], device=line.device)
        short = (back + inputs_BT.shape[1] - line.shape[1], 0)
        return F.pad(line, short), F.pad(at >= self.since.unsqueeze(1), short)

    def tensors(self) -> list[Tensor]:
        """All of it, for files."""
        return [self.since, *(t[:, : self.size].contiguous() for t in self.book.tensors())]

    def of(self, tensors: list[Tensor]) -> History:
        """The history made of such `tensors`."""
        since, inputs, keys, values, rates = tensors
        size = inputs.shape[1]
        return History(_Book(inputs, keys, values, rates, size), size, since)


class Recalled(NamedTuple):
    """What a segment's contexts recall."""

    rows: Tensor
    """(B, T, E): what the softmax sees beside h_t: m_t, read out, and the rows of the corpus
    (`mlm.extensions.ngrams`)."""
    rates: Tensor
    """(B, T, K): 1 / (1 + n_k(t))."""
    within: Tensor
    """(B, T, T): sum_k eta_k / (1 + n_k(s)), that of k = 1 times kappa, over the orders in which a
    context t of the segment was that of s < t, else 0."""
    own: Tensor
    """(B, T, E): m_t = sum_k m_k[c_k(t)] alone."""
    keys: Tensor
    """(B, T, E): the hidden states h_t that recalled it."""

    def heard(self, gradient_BTE: Tensor) -> Heard:
        """What is learned from the segment, `Heard.gradient` being known."""
        return Heard(self.rates, self.own, self.keys, gradient_BTE)


class Heard(NamedTuple):
    """What is learned from a segment."""

    rates: Tensor
    """(B, T, K): 1 / (1 + n)."""
    own: Tensor
    """(B, T, E): what its contexts recalled, `Recalled.own`."""
    keys: Tensor
    """(B, T, E): h."""
    gradient: Tensor
    """(B, T, E): of sum(nll) / T by what the softmax saw."""


class ReadOut(NamedTuple):
    """How what is recalled enters the softmax (`mlm.extensions.read_out`)."""

    map: Tensor
    """(E, E): D."""
    gate: Tensor
    """(E,): w."""
    known: Tensor
    """(E, K): B."""
    hold: Tensor
    """(E, K): C."""
    inner: Tensor
    """(U, 2 E + K): V."""
    outer: Tensor
    """(E, U): A."""

    def said(self, own_E: Tensor, visited_K: Tensor, state_E: Tensor) -> Tensor:
        """What the softmax sees beside h: m_t, n_t and h_t as `mlm.extensions.read_out` puts them together;
        all of them with the same dimensions before the last."""
        gate = 1 + (state_E @ self.gate).unsqueeze(-1)
        mapped = gate * (own_E + F.linear(own_E, self.map))
        known = F.linear(visited_K, self.known) + F.linear(visited_K, self.hold) * state_E
        units = F.linear(torch.cat([state_E, own_E, visited_K], -1), self.inner).relu()
        return mapped + known + F.linear(units, self.outer) * visited_K.amax(-1, keepdim=True)


class Phrases(NamedTuple):
    """How phrases are remembered."""

    tokens: int
    """A lane's last so many, before a segment, count; 0 = the corpus alone."""
    scale: Tensor
    """(E,): 1 / w, the same for all."""
    steps: Tensor
    """(K,): eta."""
    ngrams: NGrams | None = None
    """Where the rows begin: what stage 1 has learned of phrases; None = at zero."""
    read_out: ReadOut | None = None
    """How rows are read that articles wrote; None = as they are."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Phrases:
        """The same on `device`, optionally in another dtype."""
        scale, steps = (t.to(device, dtype) for t in (self.scale, self.steps))
        ngrams = self.ngrams and self.ngrams.to(device, dtype)
        read_out = self.read_out and ReadOut(*(t.to(device, dtype) for t in self.read_out))
        return Phrases(self.tokens, scale, steps, ngrams, read_out)

    def of_corpus(self) -> Phrases | None:
        """What the corpus has taught, and nothing else."""
        none = torch.zeros_like(self.steps)
        return self.ngrams and self._replace(tokens=0, steps=none, read_out=None)

    def begin(self, lanes: int) -> History:
        """Lanes that have read nothing."""
        some, width = self.scale, len(self.scale)
        inputs = torch.zeros(lanes, 0, dtype=torch.int64, device=some.device)
        sizes = width, width, len(self.steps)
        keys, values, rates = (some.new_zeros(lanes, 0, n) for n in sizes)
        since = torch.zeros(lanes, dtype=torch.int64, device=some.device)
        return History(_Book(inputs, keys, values, rates, 0), 0, since)

    @torch.no_grad()
    def recall(self, history: History, inputs_BT: Tensor, keys_BTE: Tensor) -> Recalled:
        """What lanes recall at each of these tokens from before the segment.

        Args:
            keys_BTE: the hidden states h of the segment.
        """
        first = max(0, history.size - self.tokens)
        found = _recall_fused if kernels.usable(self.scale) else _recall
        own, rates, within = found(history, first, inputs_BT, keys_BTE, self.steps)
        rows = own if self.read_out is None else self.read_out.said(own, 1 - rates, keys_BTE)
        if self.ngrams is not None:
            rows = rows + self.ngrams.said(self.known(self.ngrams, history, inputs_BT))
        return Recalled(rows.detach(), rates, within, own, keys_BTE)

    @staticmethod
    def known(ngrams: NGrams, history: History, inputs_BT: Tensor) -> Tensor:
        """(B, T, K): the rows that the corpus has for a segment's contexts."""
        return ngrams.find(*history.line(inputs_BT, LONGEST - 1), inputs_BT.shape[1])

    @torch.no_grad()
    def learned(
        self, history: History, inputs_BT: Tensor, heard: Heard, taught_BT: Tensor
    ) -> History:
        """The history with a segment more.

        Args:
            taught_BT: tokens that teach; what precedes them in their lane is forgotten.
        """
        length = inputs_BT.shape[1]
        values_BTE = heard.gradient * (-length * self.scale)
        history = _with_room(history, length, self.tokens)
        book, lo = history.book, history.size
        more = inputs_BT, heard.keys, values_BTE, heard.rates
        for kept, new in zip(book.tensors(), more, strict=True):
            kept[:, lo : lo + length] = new
        book.filled = lo + length
        first_B = taught_BT.int().argmax(1)
        since = torch.where(first_B > 0, lo + first_B, history.since)
        return History(book, book.filled, since)


def phrases(head_VE: Tensor, tokens: int, ngrams: NGrams | None = None) -> Phrases:
    """For a static output embedding, whose rows are the tokens'."""
    scale = 1 / head_VE.detach().square().sum(1).mean()
    return Phrases(tokens, scale.repeat(head_VE.shape[1]), scale.new_tensor(STEPS), ngrams)


def of_corpus(weights: Mapping[str, Tensor]) -> Phrases | None:
    """For lanes that read with a language model's n-grams alone; None if it has none."""
    ngrams = ngrams_of(weights)
    return ngrams and phrases(weights["embedding"], 0, ngrams).of_corpus()


def _with_room(history: History, length: int, tokens: int) -> History:
    """A history to whose book `length` columns can be appended."""
    book, size = history.book, history.size
    if book.filled == size and size + length <= book.inputs.shape[1]:
        return history
    first = max(0, size - max(tokens, LONGEST - 1), min(size, int(history.since.min())))
    kept = size - first
    room = kept + max(kept, 4 * length)
    more = []
    for tensor in book.tensors():
        new = tensor.new_empty(len(tensor), room, *tensor.shape[2:])
        new[:, :kept] = tensor[:, first:size]
        more.append(new)
    inputs, keys, values, rates = more
    since = (history.since - first).clamp(min=0)
    return History(_Book(inputs, keys, values, rates, kept), kept, since)


def _recall(
    history: History, first: int, inputs_BT: Tensor, keys_BTE: Tensor, steps_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Recalled`'s `own`, `rates` and `within`, by plain operations."""
    book, size = history.book, history.size
    line = torch.cat([book.inputs[:, first:size], inputs_BT], 1)  # (B, C + T)
    old, length = size - first, inputs_BT.shape[1]
    at = torch.arange(old + length, device=line.device)
    inside = at >= (history.since - first).unsqueeze(1)
    same = (line[:, None] == line[:, old:, None]) & inside[:, None]  # (B, T, C + T)
    same = same & (at < at[old:, None])
    run = same
    found = [same]
    for k in range(1, ORDERS[-1]):
        # the token k places before both is the same, and of the same article
        here, there = line.roll(k, 1)[:, old:], line.roll(k, 1)
        begun = inside.roll(k, 1) & (at >= k)
        run = run & (there[:, None] == here[:, :, None]) & begun[:, None]
        found.append(run)
    match = torch.stack(found, -1)  # (B, T, C + T, K)
    rates = 1 / (1 + match.sum(2).to(steps_K.dtype))
    every = torch.cat([book.rates[:, first:size], rates], 1)  # (B, C + T, K)
    keys = torch.cat([book.keys[:, first:size], keys_BTE], 1)  # (B, C + T, E)
    apart = torch.cdist(keys_BTE, keys).square()
    weights = match * (every * steps_K)[:, None]
    weights[..., 0] *= (apart * (-ALIKE / 2)).exp()
    weights = weights.sum(-1)
    rows = weights[:, :, :old] @ book.values[:, first:size]
    return rows, rates, weights[:, :, old:]


def _recall_fused(
    history: History, first: int, inputs_BT: Tensor, keys_BTE: Tensor, steps_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    book, (lanes, length) = history.book, inputs_BT.shape
    rows = book.values.new_zeros(lanes, length, book.values.shape[2])
    rates = book.rates.new_empty(lanes, length, len(steps_K))
    within = book.rates.new_zeros(lanes, length, length)
    kernels.share_out(
        kernels.recall_phrases,
        lanes,
        rows.numel() + lanes * length * (history.size - first),
        *book.tensors(),
        history.size,
        first,
        history.since,
        inputs_BT.contiguous(),
        keys_BTE.contiguous(),
        steps_K,
        steps_K.new_tensor([-ALIKE / 2]),
        rows,
        rates,
        within,
    )
    return rows, rates, within
