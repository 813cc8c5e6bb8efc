"""N-gram memory: what followed the last tokens read, earlier in the article (fast weights).

The weights that every lane rewrites hold little of a phrase seen once. Beside them a lane keeps a
table of n-gram embeddings, zero in theta_0, one row m_k[c] (E) for every context c of k tokens,
k = 1 .. 9. The output layer reads their sum together with the hidden state,

    logits_t = output layer(h_t + sum_k m_k[c_k(t)]),        c_k(t): the last k tokens read,

and the rows learn by gradient descent as all weights do: after a segment, from the gradient g_s of
every token's loss by what its softmax saw,

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
Tokens that the table predicts leave little gradient for the other weights. With intra-segment
adaptation the table teaches within the segment, too: a context that comes again moves the logits by
-eta_k / (1 + n_k(s)) e_s, what its row would say were words' embeddings orthogonal. Learned rules
read so, and may learn how what is recalled enters the softmax (`mlm.extensions.ngram_read_out`).

Letters: B lanes, T tokens, C tokens stored, E width of what the softmax sees, K orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mlm import kernels
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Extent, Outcome, Plan, Told
from mlm.models.language_model import Weights
from mlm.rules.gates import LinearGates
from mlm.text.streams import Segment

LONGEST_CONTEXT = 9
"""Tokens of the longest context."""
STEPS = (1.3, 0.9, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5)
"""eta_k, k = 1 .. 9: the best on the tuning words of the benchmark `claim`, as is the next."""
ALIKE = 0.35
"""Of kappa, in units of the hidden state."""
SCALE, ETA = "scale", "steps"
"""Names of 1 / w (E,) and of eta (K,)."""


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

    def columns(self, size: int) -> list[Tensor]:
        """All of it in `size` columns, (B, size, ...), behind `since`: no lane looks into the empty
        ones before."""
        more = size - self.size
        wide = (
            torch.cat([t.new_zeros(len(t), more, *t.shape[2:]), t[:, : self.size]], 1)
            for t in self.book.tensors()
        )
        return [self.since + more, *wide]

    def tensors(self) -> list[Tensor]:
        """All of it, for files: of every lane only what it sees, one lane behind the other."""
        seen_BC = self._seen()
        parts = [t[:, : self.size][seen_BC] for t in self.book.tensors()]
        return [torch.cat([self.since.new_tensor([self.size]), self.since]), *parts]

    def of(self, tensors: list[Tensor]) -> History:
        """The history made of such `tensors`; what no lane sees is zero.

        Those of `columns` are taken as they are.
        """
        marks, *parts = tensors
        if parts[0].dim() == 2:
            size = parts[0].shape[1]
            return History(_Book(*parts, filled=size), size, marks)
        size, since = int(marks[0]), marks[1:]
        found = self._replace(size=size, since=since)
        seen_BC, rows = found._seen(), []
        for part in parts:
            rows.append(part.new_zeros(len(since), size, *part.shape[1:]))
            rows[-1][seen_BC] = part
        inputs, keys, values, rates = rows
        return found._replace(book=_Book(inputs, keys, values, rates, size))

    def _seen(self) -> Tensor:
        """(B, C): which columns hold what a lane has read of its article."""
        return torch.arange(self.size, device=self.since.device) >= self.since.unsqueeze(1)


def inverse_square_length(head_VE: Tensor) -> Tensor:
    """1 / w, w the mean square length of an output embedding's rows; (E,), the same for all."""
    scale = 1 / head_VE.detach().square().sum(1).mean()
    return scale.repeat(head_VE.shape[1])


class Lookup(NamedTuple):
    """What a segment's contexts recall."""

    rows: Tensor
    """(B, T, E): m_t = sum_k m_k[c_k(t)]."""
    rates: Tensor
    """(B, T, K): 1 / (1 + n_k(t))."""
    within: Tensor
    """(B, T, T): sum_k eta_k / (1 + n_k(s)), that of k = 1 times kappa, over the orders in which a
    context t of the segment was that of s < t, else 0."""
    keys: Tensor
    """(B, T, E): the hidden states h_t that recalled it."""


@dataclass(frozen=True)
class NGramMemory(Extension):
    """A table of n-gram embeddings that learned rules write beside the weights."""

    tokens: int = 0
    """Tokens of the article in which learned rules look for the last one to nine read: a table of
    n-gram embeddings learns what followed them; 0 = none. 8192 holds most articles."""
    steps: tuple[float, ...] = STEPS
    """eta_k, one for every number of tokens, 1 to 9."""
    hand_made: bool = False
    """Whether hand-made rules read with it, too; as published they do not."""
    name: ClassVar[str] = "ngram_memory"

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.tokens > 0

    def fingerprint(self) -> dict[str, Any]:
        """Settings and constants; whether hand-made rules read with it only where they do."""
        found = super().fingerprint()
        if not self.hand_made:
            found.pop("hand_made")
        return found

    def applies_to(self, rule: Any) -> bool:
        """Learned rules; hand-made ones read as they were published, unless the settings say."""
        return self.hand_made or isinstance(rule, LinearGates)

    def problems(self, plan: Plan) -> Sequence[str]:
        """Every number of tokens needs its step."""
        if len(self.steps) == LONGEST_CONTEXT:
            return ()
        return (
            f"--ngram-memory.steps names {len(self.steps)} steps; it must be {LONGEST_CONTEXT}, "
            "one for every number of tokens",
        )

    def lane_bytes(self, extent: Extent) -> float:
        """The book, and the one it grows into."""
        columns = min(self.tokens, extent.longest) + 4 * extent.segment
        return 2.5 * 4 * extent.lanes * columns * (2 * extent.width + LONGEST_CONTEXT + 2)

    def derived(self, base: AdaptationBase) -> Weights:
        """1 / w of the embedding as it is now, and eta, made once.

        Raises:
            ValueError: the model's hidden states are not known before its output layer reads.
        """
        if not hasattr(base.model, "run"):
            raise ValueError("n-gram memory needs a language model that stage 1 trains")
        scale = inverse_square_length(base.weights["embedding"])
        found = {self.key(SCALE): scale}
        if self.key(ETA) not in base.weights:
            found[self.key(ETA)] = scale.new_tensor(self.steps)
        return found

    def begin(self, base: AdaptationBase, lanes: int) -> History:
        """Lanes that have read nothing."""
        some, orders = base.weights[self.key(SCALE)], len(self.steps)
        inputs = torch.zeros(lanes, 0, dtype=torch.int64, device=some.device)
        keys, values, rates = (some.new_zeros(lanes, 0, n) for n in (len(some), len(some), orders))
        since = torch.zeros(lanes, dtype=torch.int64, device=some.device)
        return History(_Book(inputs, keys, values, rates, 0), 0, since)

    def open(self, value: History, new_B: Tensor, reset_B: Tensor) -> History:
        """Nothing is known where lanes begin again."""
        return value.opened(reset_B)

    @torch.no_grad()
    def before(
        self, weights: Weights, value: History, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        """What lanes recall at each of these tokens from before the segment."""
        first = max(0, value.size - self.tokens)
        scale, steps = weights[self.key(SCALE)], weights[self.key(ETA)]
        look = _look_up_fused if kernels.usable(scale) else _look_up
        found = Lookup(*look(value, first, segment.inputs, hidden_BTE, steps), hidden_BTE)
        told = told._replace(terms=told.terms._replace(repeats=found.within))
        return told.with_added(found.rows).with_note(self.name, found)

    @torch.no_grad()
    def after(
        self, weights: Weights, value: History, segment: Segment, note: Lookup, out: Outcome
    ) -> History:
        """The history with a segment more; what precedes a lane's first taught token is
        forgotten."""
        assert out.gradient is not None
        length = segment.inputs.shape[1]
        values_BTE = out.gradient * (-length * weights[self.key(SCALE)])
        value = _with_room(value, length, self.tokens)
        book, lo = value.book, value.size
        more = segment.inputs, note.keys, values_BTE, note.rates
        for kept, new in zip(book.tensors(), more, strict=True):
            kept[:, lo : lo + length] = new
        book.filled = lo + length
        first_B = out.taught.int().argmax(1)
        since = torch.where(first_B > 0, lo + first_B, value.since)
        return History(book, book.filled, since)


def _with_room(history: History, length: int, tokens: int) -> History:
    """A history to whose book `length` columns can be appended."""
    book, size = history.book, history.size
    if book.filled == size and size + length <= book.inputs.shape[1]:
        return history
    first = max(0, size - tokens, min(size, int(history.since.min())))
    kept = size - first
    room = kept + max(kept // 4, 4 * length)
    more = []
    for tensor in book.tensors():
        new = tensor.new_empty(len(tensor), room, *tensor.shape[2:])
        new[:, :kept] = tensor[:, first:size]
        more.append(new)
    inputs, keys, values, rates = more
    since = (history.since - first).clamp(min=0)
    return History(_Book(inputs, keys, values, rates, kept), kept, since)


def _look_up(
    history: History, first: int, inputs_BT: Tensor, keys_BTE: Tensor, steps_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`, `rates` and `within` of `Lookup`, by plain operations."""
    book, size = history.book, history.size
    line = torch.cat([book.inputs[:, first:size], inputs_BT], 1)  # (B, C + T)
    old, length = size - first, inputs_BT.shape[1]
    at = torch.arange(old + length, device=line.device)
    inside = at >= (history.since - first).unsqueeze(1)
    same = (line[:, None] == line[:, old:, None]) & inside[:, None]  # (B, T, C + T)
    same = same & (at < at[old:, None])
    run = same
    found = [same]
    for k in range(1, LONGEST_CONTEXT):
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


def _look_up_fused(
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
