"""Vocabularies: words <-> tokens, fitted on training text.

A word is what whitespace separates; every line ends in one more word, `<eos>`. Tokens never cross
words, so the tokens that start a word (`Vocabulary.starts_word`) count exactly the words of
`mlm.text.articles.count_words`, and perplexity per word means the same for every vocabulary. What
tokens spell is the canonical text (`mlm.spelling.canonical_text`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlm.base.errors import UserError
from mlm.base.files import atomic_path, write_text
from mlm.base.names import EOS
from mlm.spelling import MARKER, canonical_characters, spelling_nats
from mlm.text.articles import Article, count_words

UNK = "<unk>"


KINDS = ("bpe", "unigram", "word")


_CACHED_WORDS = 200_000  # about 60 MB per process; covers 98 % of WikiText-103's words


_FITTED_TYPES = 1_000_000  # SentencePiece is fitted on at most this many types of word


# SentencePiece is fitted on longer words in parts: it skips rows of over 4,192 bytes and whatever
# holds a NUL. So short parts also keep the marker of a word's start among the characters it covers.
_PARTS = re.compile("[^\0]{1,1000}")


_FORMAT = 1


_JSON = "vocabulary.json"


class Unknown(NamedTuple):
    """Words of an article that a vocabulary of whole words does not hold."""

    at: np.ndarray
    """int64 (U,): their places among the tokens."""
    bytes: np.ndarray
    """int64 (U,): what their spellings measure."""

    def nats(self) -> np.ndarray:
        """(U,) what they cost besides their tokens' losses (`mlm.spelling.spelling_nats`)."""
        return spelling_nats(self.bytes)


class Vocabulary(ABC):
    """Words <-> tokens.

    kind: "bpe", "unigram" or "word". size: number of tokens V. eos_id, unk_id: tokens of a line's
    end and of WikiText's `<unk>`. hash: identifies the vocabulary. starts_word: bool (V,), True
    for tokens that begin a word; `<eos>` is a word of its own.
    """

    kind: str
    size: int
    eos_id: int
    unk_id: int
    hash: str
    starts_word: np.ndarray
    _known: dict[str, tuple[int, ...]]  # word -> tokens, of the words met so far

    @abstractmethod
    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Tokens of a word not in `_known`, at least one; only the first starts a word."""

    @abstractmethod
    def _word(self, tokens: Sequence[int]) -> str:
        """Text of the tokens of one word."""

    @abstractmethod
    def _body(self) -> bytes:
        """All that the vocabulary is made of: SentencePiece's model, or the words."""

    def save(self, directory: Path, as_json: bool = False) -> None:
        """Write the vocabulary below `directory`, atomically; `load_vocabulary` reads it.

        Args:
            as_json: as `vocabulary.json`, the form of released models, not `vocabulary.model`.
        """
        header: dict[str, Any] = {"kind": self.kind, "hash": self.hash, "format": _FORMAT}
        if as_json:
            text = json.dumps(header | {"model": base64.b64encode(self._body()).decode()})
            write_text(Path(directory) / _JSON, text + "\n")
            return
        with atomic_path(Path(directory) / "vocabulary.model") as path:
            path.write_bytes(json.dumps(header).encode() + b"\n" + self._body())

    def encode_line(self, line: str) -> list[int]:
        """Tokens of the words of one line, without its `<eos>`."""
        tokens: list[int] = []
        known = self._known
        for word in line.split():
            tokens += known.get(word) or self._encode_word(word)
        return tokens

    def encode_article(self, text: str) -> np.ndarray:
        """Tokens int32 (T,) of all lines of `text`, each followed by `<eos>`."""
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        tokens: list[int] = []
        for line in lines:
            tokens.extend(self.encode_line(line))
            tokens.append(self.eos_id)
        return np.array(tokens, dtype=np.int32)

    def unknown(self, text: str, tokens: np.ndarray) -> Unknown:
        """The unknown words of `text`, which was encoded as `tokens`; pieces spell every word."""
        return Unknown(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    @property
    def noise(self) -> np.ndarray:
        """Tokens to draw an unknown script from, each as often as it comes: none but of pieces."""
        return np.zeros(0, dtype=np.int64)

    @abstractmethod
    def _spellings(self) -> list[bytes]:
        """What every token spells, without the space before a word; `<eos>` as a word."""

    @cached_property
    def _sizes(self) -> np.ndarray:
        """(V,) bytes of what every token spells; 0 for `<eos>`."""
        sizes = np.array([len(spelling) for spelling in self._spellings()], dtype=np.int64)
        sizes[self.eos_id] = 0
        return sizes

    def spelled_bytes(self, tokens: np.ndarray, unknown: Unknown) -> int:
        """UTF-8 bytes of the text that an article's tokens spell, unknown words as they were."""
        ends = tokens == self.eos_id
        blank = ends & np.concatenate([[True], ends[:-1]])[: len(ends)]
        # A line of n words has n - 1 spaces and a newline.
        joints = int((self.starts_word[tokens] & ~ends).sum() + blank.sum())
        spelled = int(self._sizes[tokens].sum() - self._sizes[tokens[unknown.at]].sum())
        return joints + spelled + int(unknown.bytes.sum())

    def words(self, ids: Iterable[int]) -> list[str]:
        """The words that `ids` spell, one per token that starts a word; `<eos>` is "<eos>".

        Ids before the first word start (a segment cut inside a word) are one word of their own.
        """
        words: list[str] = []
        pending: list[int] = []
        for token in ids:
            if self.starts_word[token] and pending:
                words.append(self._word(pending))
                pending = []
            pending.append(int(token))
        return [*words, self._word(pending)] if pending else words

    @cached_property
    def pieces(self) -> list[str]:
        """Every token's spelling, a leading space where it begins a word."""
        return [
            (" " if self.starts_word[token] else "") + "".join(self.words([token]))
            for token in range(self.size)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: words joined by single spaces, `<eos>` as a newline."""
        lines: list[list[str]] = [[]]
        word: list[int] = []
        for token in (*ids, None):
            if word and (token is None or self.starts_word[token]):
                lines[-1].append(self._word(word))
                word = []
            if token == self.eos_id:
                lines.append([])
            elif token is not None:
                word.append(int(token))
        return "\n".join(" ".join(line) for line in lines)


class WordVocabulary(Vocabulary):
    """One token per word type, by falling frequency; other words are `<unk>`."""

    kind = "word"

    def __init__(self, types: Sequence[str]) -> None:
        self.types = list(types)
        self.size = len(self.types)
        self._known = {
            word: (index,)
            for index, word in enumerate(self.types)
            if word == canonical_characters(word)
        }
        (self.eos_id,), (self.unk_id,) = self._known[EOS], self._known[UNK]
        # A word spelled "<eos>" in the text is no line end: it would cut the line in two.
        self._known[EOS] = (self.unk_id,)
        self.starts_word = np.ones(self.size, dtype=bool)
        self.hash = hashlib.sha256("\n".join(["word", *self.types]).encode()).hexdigest()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return self._known.get(canonical_characters(word), (self.unk_id,))

    def unknown(self, text: str, tokens: np.ndarray) -> Unknown:
        at = np.flatnonzero(tokens == self.unk_id)
        if not len(at):
            return super().unknown(text, tokens)
        words = [w for line in text.split("\n") for w in (*line.split(), EOS)]
        # WikiText's own `<unk>` is a word like others.
        places = [int(t) for t in at if words[t] != UNK]
        sizes = [len(canonical_characters(words[t]).encode()) for t in places]
        return Unknown(np.array(places, dtype=np.int64), np.array(sizes, dtype=np.int64))

    def _spellings(self) -> list[bytes]:
        return [word.encode() for word in self.types]

    def _word(self, tokens: Sequence[int]) -> str:
        return self.types[tokens[0]]

    def _body(self) -> bytes:
        return "\n".join(self.types).encode()


class PieceVocabulary(Vocabulary):
    """SentencePiece tokens (BPE or unigram) inside words, with bytes for unknown characters.

    WikiText's `<unk>` is one token. Every canonical text can be encoded without loss.
    """

    def __init__(self, kind: str, model: bytes) -> None:
        import sentencepiece

        self.kind = kind
        self._model = model
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.size = int(self._processor.get_piece_size())
        self.unk_id = int(self._processor.unk_id())
        self.eos_id = int(self._processor.eos_id())
        self.hash = hashlib.sha256(kind.encode() + model).hexdigest()
        pieces = [str(self._processor.id_to_piece(i)) for i in range(self.size)]
        if MARKER not in pieces:
            raise ValueError("it lacks the marker of a word's start")
        self.starts_word = np.array([piece.startswith(MARKER) for piece in pieces])
        self.starts_word[[self.unk_id, self.eos_id]] = True
        self._bytes = [
            bytes([int(piece[3:5], 16)])
            if self._processor.is_byte(index)
            else piece.removeprefix(MARKER).encode()
            for index, piece in enumerate(pieces)
        ]
        self._known = {UNK: (self.unk_id,)}

    def _encode_word(self, word: str) -> tuple[int, ...]:
        tokens = tuple(self._processor.encode(canonical_characters(word), out_type=int))
        if len(self._known) < _CACHED_WORDS:
            self._known[word] = tokens
        return tokens

    def _word(self, tokens: Sequence[int]) -> str:
        return b"".join(self._bytes[token] for token in tokens).decode("utf-8", "replace")

    def _spellings(self) -> list[bytes]:
        return self._bytes

    @property
    def noise(self) -> np.ndarray:
        pieces = self._processor
        bytes_ = [token for token in range(self.size) if pieces.is_byte(token)]
        # Words of eight bytes on average.
        return np.array(bytes_ + [pieces.piece_to_id(MARKER)] * (len(bytes_) // 8), dtype=np.int64)

    def _body(self) -> bytes:
        return self._model


def load_vocabulary(directory: Path) -> Vocabulary:
    """Read what `Vocabulary.save` wrote; `UserError` if it is missing or damaged."""
    path = Path(directory) / "vocabulary.model"
    released = not path.exists() and (Path(directory) / _JSON).exists()
    path = Path(directory) / _JSON if released else path
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        header = json.loads(head)
        kind = header["kind"]
        if released:
            body = base64.b64decode(header["model"])
        vocabulary: Vocabulary
        if kind == "word":
            vocabulary = WordVocabulary(body.decode().split("\n"))
        else:
            vocabulary = PieceVocabulary(kind, body)
        if vocabulary.hash != header["hash"]:
            raise ValueError("its hash does not match its content")
    except FileNotFoundError:
        raise UserError(f"no vocabulary {path}; give a folder that training has written") from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"vocabulary {path} is damaged ({error}); delete it and run again"
        ) from None
    return vocabulary


def fit_vocabulary(articles: Iterable[Article], kind: str, size: int) -> Vocabulary:
    """Fit a vocabulary of `size` tokens on training articles, read once as a stream.

    kind: "bpe" or "unigram" (SentencePiece, fitted on word counts, so on all of the text) or
    "word" (`size` 0 = every type; with less, rarer words become `<unk>`). Raises `UserError` if
    the text does not support `size`.
    """
    if kind not in KINDS:
        raise UserError(f"no vocabulary kind {kind!r}; --vocabulary is one of {KINDS}")
    counts: Counter[str] = Counter()
    line_ends = 0
    for article in articles:
        words = canonical_characters(article.text).split()
        counts.update(words)
        line_ends += count_words(article.text) - len(words)
        if kind != "word" and len(counts) > 2 * _FITTED_TYPES:
            counts = Counter(dict(counts.most_common(_FITTED_TYPES)))
    if kind == "word":
        return _fit_words(counts, line_ends, size)
    return PieceVocabulary(kind, _fit_pieces(counts, kind, size))


def _fit_words(counts: Counter[str], line_ends: int, size: int) -> WordVocabulary:
    counts[EOS] = line_ends
    counts.setdefault(UNK, 0)
    if size < 0 or size == 1 or size > len(counts):
        raise UserError(
            f"--vocabulary-size {size}: the training text has {len(counts):,} types of word "
            f"({EOS} and {UNK} included). Give at most {len(counts)}, or 0 for all of them"
        )
    types = [word for word, _ in counts.most_common()]
    if size:
        kept = [word for word in types if word not in (EOS, UNK)][: size - 2]
        wanted = {EOS, UNK, *kept}
        types = [word for word in types if word in wanted]
    return WordVocabulary(types)


def _fit_pieces(counts: Counter[str], kind: str, size: int) -> bytes:
    import sentencepiece

    def rows() -> Iterator[str]:
        for word, count in counts.most_common(_FITTED_TYPES):
            if word != UNK:
                yield from (f"{part}\t{count}" for part in _PARTS.findall(word))

    flag = f"--vocabulary-size {size}"
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=rows(),
            input_format="tsv",
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            unk_id=0,
            unk_piece=UNK,
            unk_surface=UNK,
            eos_id=1,
            eos_piece=EOS,
            bos_id=-1,
            pad_id=-1,
            num_threads=2,  # fixed: the result must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        if found := re.search(r"too high.*<= (\d+)", message, re.DOTALL):
            raise UserError(
                f"{flag}: larger than the training text supports. The largest possible size is "
                f"{found[1]}"
            ) from None
        if found := re.search(r"required_chars. \d+ vs (\d+)", message):
            raise UserError(
                f"{flag}: too small to hold 256 bytes and the characters of the training text. "
                f"The smallest possible size is {found[1]}"
            ) from None
        raise UserError(f"{flag}: SentencePiece cannot fit the training text ({message})") from None
    return model.getvalue()
