"""Reading text as people write it, while learning from it: `DocumentReader`.

Letters: M tokens per segment, V vocabulary, W words, T pieces.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from mlm.base.errors import UserError
from mlm.kernels.switches import Switches, computing
from mlm.reader.tracks import Track
from mlm.reader.words import STATS, Batch, Prices, rows
from mlm.reading.lanes import Details
from mlm.spelling import Word, WordFeed, canonical_characters, detokenise, spelling_nats
from mlm.store.tensors import save_tensors
from mlm.text.streams import Segment
from mlm.text.vocabulary import UNK, Vocabulary


def spell(word: Word, vocabulary: Vocabulary, wikitext: bool) -> tuple[list[int], list[float]]:
    """Tokens of a word, and what each costs besides its loss, in nats.

    A word that a vocabulary of whole words does not hold costs its token `<unk>` and its spelling,
    `spelling_nats`. WikiText's own `<unk>` is a word like others.
    """
    if word.line_end:
        return [vocabulary.eos_id], [0.0]
    tokens: list[int] = []
    costs: list[float] = []
    for form in map(canonical_characters, word.forms):
        found = vocabulary.encode_line(form)
        unknown = found == [vocabulary.unk_id] and not (wikitext and form == UNK)
        tokens += found
        costs += [0.0] * len(found)
        if unknown:
            costs[-1] = spelling_nats(len(form.encode()))
    return tokens, costs


@dataclass
class _Document:
    """What is under way in a document."""

    feed: WordFeed
    previous: int
    """The token read before the next one."""
    new: bool
    """Whether the next segment opens an article."""
    tokens: list[int] = field(default_factory=list)
    """Not learned from yet."""
    skip: int = 0
    """The first so many of them are of documents before."""
    costs: list[float] = field(default_factory=list)
    """Of all pieces of `words`: what they cost besides their losses."""
    words: list[tuple[Word, int]] = field(default_factory=list)
    """Not handed out yet, with their numbers of pieces."""
    nll: dict[str, list[np.ndarray]] = field(default_factory=dict)
    boundary: dict[str, list[np.ndarray]] = field(default_factory=dict)
    details: list[Details] = field(default_factory=list)
    """By column, of the pieces of `words` that are read."""
    known: int = 0
    """Of these pieces, so many are read."""
    place: int = 0
    """Words handed out."""
    at: int = 0
    """Tokens read."""


class DocumentReader:
    """Reads documents one after another, and learns from them as its rule does.

    A value: a copy is independent, and no other reader, thread or switch of the process changes
    what this one says. Make one with `TrainedModel.reader`.
    """

    def __init__(
        self,
        tracks: dict[str, Track],
        vocabulary: Vocabulary,
        of: Any,
        about: Mapping[str, Any],
        segment: int,
        switches: Switches,
        stream: bool,
        names: Sequence[str],
    ) -> None:
        """Called by `TrainedModel.reader`.

        Args:
            tracks: what reads, by column; the first is the main rule's.
            of: the table's schema.
            about: the model, the rules and so on, as in the table's metadata.
            segment: M.
            stream: whether documents go on where the last one ended.
            names: the pieces' spellings, by token.
        """
        self._tracks, self._vocabulary, self._names = tracks, vocabulary, names
        self._schema, self._about = of, dict(about)
        self._segment, self._switches, self._stream = segment, switches, stream
        self._document: _Document | None = None
        self._number = 0
        self._last = vocabulary.eos_id
        self._left: list[int] = []
        """Tokens of ended documents that fill no segment yet (stream)."""
        self._device = next(iter(tracks.values())).starts_word.device

    # -- reading ------------------------------------------------------------------------------

    def read(self, chunk: str) -> Any:
        """Read on in the present document, or begin one.

        However a text is divided into chunks, its words get the same numbers, bit for bit.

        Returns:
            An Arrow table of the words that are priced by now: a word is once the segment that
            holds the piece behind it is full. `finish` gives the rest.
        """
        with computing(self._switches):
            document = self._opened()
            self._take(document.feed.read(chunk))
            return self._rows({}, final=False)

    def finish(self) -> Any:
        """End the present document: the table of its remaining words.

        In protocol `article` its last, shorter segment teaches, too; in `stream` the next document
        goes on in the same segment.
        """
        with computing(self._switches):
            document = self._opened()
            self._take(document.feed.finish())
            if self._stream and not self._frozen:
                last = self.copy()  # what ends no segment is read again, with what follows
                after = last._read_end()
                table = last._rows(after, final=True)
                self._left = document.tokens
            else:
                after = self._read_end()
                table = self._rows(after, final=True)
            self._document, self._last = None, document.previous
            self._number += 1
            return table

    def _read_end(self) -> dict[str, float]:
        """Read what fills no segment; by column, -log P(a word begins) behind the last piece."""
        document = self._opened()
        count = len(document.tokens)
        if count:
            return self._read_segment()
        segment, after = self._next_segment([]), {}
        for name, track in self._tracks.items():
            log_p = track.ahead(segment)[0, 0, track.starts_word]
            after[name] = -float(log_p.double().logsumexp(0))
        return after

    def score(self, text: str) -> Any:
        """Read a text as one document: an Arrow table with a row for every word.

        Raises:
            UserError: a document that `read` began has not been finished.
        """
        self._closed("score")
        return pa.concat_tables([self.read(text), self.finish()])

    def _closed(self, doing: str) -> None:
        if self._document is not None:
            raise UserError(
                f"{doing}: a document is under way; end it with finish(), or use a copy() made "
                "before it began"
            )

    @property
    def _frozen(self) -> bool:
        return any(track.frozen for track in self._tracks.values())

    def _opened(self) -> _Document:
        if self._document is None:
            goes_on = self._stream and self._number > 0 and not self._frozen
            tracks = self._tracks.values()
            if not goes_on:
                for track in tracks:
                    track.open()
                self._left, self._last = [], self._vocabulary.eos_id
            fresh = not goes_on and not any(track.remembers for track in tracks)
            document = _Document(WordFeed(str(self._about["form"])), self._last, fresh)
            document.tokens, document.skip = list(self._left), len(self._left)
            self._document = document
        return self._document

    def _take(self, words: list[Word]) -> None:
        """Read these words, as far as they fill segments."""
        document = self._opened()
        wikitext = self._about["form"] == "wikitext"
        for word in words:
            tokens, costs = spell(word, self._vocabulary, wikitext)
            document.words.append((word, len(tokens)))
            document.tokens += tokens
            document.costs += costs
            while len(document.tokens) >= self._segment:
                self._read_segment()

    def _next_segment(self, tokens: list[int]) -> Segment:
        """The next segment, as far as it is known; of one lane."""
        document, size = self._opened(), self._segment
        fill = [self._vocabulary.eos_id] * size
        inputs, targets = (
            torch.tensor([(some + fill)[:size]]) for some in ([document.previous, *tokens], tokens)
        )
        mask = torch.arange(size).unsqueeze(0) < len(tokens)
        new, place = torch.tensor([document.new]), np.array([document.at])
        return Segment(inputs, targets, mask, new, np.array([0]), place).to(self._device)

    def _read_segment(self) -> dict[str, float]:
        """Read the next segment; by column, -log P(a word begins) behind one that is not full."""
        document, after = self._opened(), {}
        tokens, skip = document.tokens[: self._segment], document.skip
        segment, count = self._next_segment(tokens), len(tokens)
        wanted = any(name in self._schema.names for name in STATS)
        for k, (name, track) in enumerate(self._tracks.items()):
            said = track.read(segment, details=wanted and k == 0)
            if not np.isfinite(said.nll[0, :count]).all():
                raise UserError(
                    f"{name}: a loss is not finite near word {document.place}; the rule's weights "
                    "diverged. Train it again with a smaller --meta.learning-rate"
                )
            document.nll.setdefault(name, []).append(said.nll[0, skip:count])
            document.boundary.setdefault(name, []).append(said.boundary[0, skip:count])
            if said.details is not None:
                document.details.append(Details(*(part[skip:count] for part in said.details[0])))
            if count < self._segment:
                after[name] = float(said.boundary[0, count])
        document.known += count - skip
        document.at += count
        document.previous, document.new, document.skip = tokens[-1], False, 0
        del document.tokens[:count]
        return after

    def _rows(self, after: dict[str, float], final: bool) -> Any:
        """The table of all words that are priced; these are handed out."""
        document = self._opened()
        first, number, tokens = [], 0, 0
        for _, count in document.words:
            if tokens + count + (not final) > document.known:
                break
            first.append(tokens)
            tokens, number = tokens + count, number + 1
        if not number:
            return self._schema.empty_table()
        batch = Batch(
            self._number,
            document.place,
            [word for word, _ in document.words[:number]],
            np.array(first),
            tokens,
        )
        costs = np.array(document.costs[:tokens])
        prices = {}
        for name in self._tracks:
            nll, boundary = (
                np.concatenate(part[name]) for part in (document.nll, document.boundary)
            )
            prices[name] = Prices(nll[:tokens] + costs, boundary[:tokens])
            if not final:
                after[name] = float(boundary[tokens])
            document.nll[name], document.boundary[name] = [nll[tokens:]], [boundary[tokens:]]
        details = None
        if document.details:
            parts = [np.concatenate(part) for part in zip(*document.details, strict=True)]
            details = Details(*(part[:tokens] for part in parts))
            document.details = [Details(*(part[tokens:] for part in parts))]
        del document.words[:number], document.costs[:tokens]
        document.known -= tokens
        document.place += number
        return rows(self._schema, batch, prices, after, details, self._names)

    # -- a value ------------------------------------------------------------------------------

    def copy(self) -> Self:
        """The same reader; what either reads, the other does not notice."""
        found = copy.copy(self)
        found._tracks = {name: track.copy() for name, track in self._tracks.items()}
        found._document = copy.deepcopy(self._document)
        return found

    def freeze(self) -> Self:
        """Learn nothing more: every document from now on is read with what is known now.

        Within a document the hidden state goes on, and an n-gram memory notices which contexts
        have come, but not what followed them.

        Raises:
            UserError: a document is under way.
        """
        self._closed("freeze")
        with computing(self._switches):
            self._learn_rest()
            for track in self._tracks.values():
                track.freeze()
        return self

    def save(self, path: str | Path) -> None:
        """Write what was learned; `TrainedModel.reader(memory=path)` begins every document with it.

        The hidden state, which is of the document, is not kept.

        Raises:
            UserError: a document is under way, or the file cannot be written.
        """
        self._closed("save")
        tensors = {
            f"{name}/{n}": t
            for name, track in self._tracks.items()
            for n, t in track.memory().items()
        }
        save_tensors(Path(path), tensors, {"memory": self._about})

    def _learn_rest(self) -> None:
        """Learn from what fills no segment yet, where documents go on (stream)."""
        if self._left:
            self._opened()
            self._read_segment()
            self._document, self._left = None, []

    # -- what comes next ----------------------------------------------------------------------

    def next_log_p(self) -> np.ndarray:
        """(V,) log-probabilities in nats of every token, as the next one after what was read."""
        with computing(self._switches):
            return self._next_log_p(next(iter(self._tracks.values())))

    def _next_log_p(self, track: Track) -> np.ndarray:
        tokens = self._opened().tokens
        segment = self._next_segment(tokens)
        return track.ahead(segment)[0, len(tokens)].double().cpu().numpy()

    def next_losses(self, candidates: Sequence[int] | None = None) -> np.ndarray:
        """Losses in nats that each of these tokens (None = all) would get if it were read next.

        They come from reading itself, one token at a time: what `next_log_p` says is checked so.
        """
        document = self._opened()
        track = next(iter(self._tracks.values()))
        wanted = range(self._vocabulary.size) if candidates is None else candidates
        at, found = len(document.tokens), []
        with computing(self._switches):
            for token in wanted:
                segment = self._next_segment([*document.tokens, int(token)])
                found.append(float(track.copy().read(segment).nll[0, at]))
        return np.array(found)

    def generate(
        self, prompt: str = "", words: int = 50, seed: int = 0, temperature: float = 1.0
    ) -> str:
        """Text that goes on from what was read and `prompt`, drawn word by word.

        It is drawn from a copy, which learns from what it draws; this reader does not change.
        `<unk>` is never drawn. The text and its lines begin with words. A line end counts as a
        word.

        Args:
            words: so many, at most.
            temperature: 1 = the model's own probabilities; less = likelier words.

        Returns:
            The new text in natural spelling, without the prompt.

        Raises:
            UserError: a temperature that is not positive.
        """
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: give a positive number, such as 0.8")
        writer = self.copy()
        main = next(iter(writer._tracks))
        writer._tracks = {main: writer._tracks[main]}
        drawn: list[int] = []
        generator = np.random.default_rng(seed)
        vocabulary = self._vocabulary
        with computing(self._switches):
            document = writer._opened()
            writer._take(document.feed.read(prompt))
            writer._take(document.feed.finish())
            begun = 0
            while True:
                log_p = writer._next_log_p(writer._tracks[main]) / temperature
                log_p[vocabulary.unk_id] = -math.inf
                if not drawn or drawn[-1] == vocabulary.eos_id:
                    log_p[~vocabulary.starts_word] = -math.inf
                p = np.exp(log_p - log_p.max())
                token = int(generator.choice(len(p), p=p / p.sum()))
                begun += bool(vocabulary.starts_word[token])
                if begun > words or len(drawn) >= 20 * words:
                    break
                drawn.append(token)
                document.tokens.append(token)
                if len(document.tokens) == writer._segment:
                    writer._read_segment()
        return detokenise(vocabulary.words(drawn))
