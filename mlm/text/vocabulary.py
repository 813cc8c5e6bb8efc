"""Vocabularies: words <-> tokens, fitted on training text.

A word is what whitespace separates; every line ends in one more word, `<eos>`. Tokens never cross
words, so the tokens that start a word (`Vocabulary.starts_word`) count exactly the words of
`mlm.text.articles.count_words`, and perplexity per word means the same for every vocabulary.
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
from pathlib import Path
from typing import Any

import numpy as np

from mlm.base.errors import UserError
from mlm.base.files import atomic_path, write_text
from mlm.base.names import EOS
from mlm.text.articles import Article, count_words

UNK = "<unk>"


KINDS = ("bpe", "unigram", "word")


_SPACE = "\u2581"  # SentencePiece's mark of a word's start


_CACHED_WORDS = 200_000  # about 60 MB per process; covers 98 % of WikiText-103's words


_FITTED_TYPES = 1_000_000  # SentencePiece is fitted on at most this many types of word


_FORMAT = 1


_JSON = "vocabulary.json"


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
        self._known = {word: (index,) for index, word in enumerate(self.types)}
        (self.eos_id,), (self.unk_id,) = self._known[EOS], self._known[UNK]
        # A word spelled "<eos>" in the text is no line end: it would cut the line in two.
        self._known[EOS] = (self.unk_id,)
        self.starts_word = np.ones(self.size, dtype=bool)
        self.hash = hashlib.sha256("\n".join(["word", *self.types]).encode()).hexdigest()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return (self.unk_id,)

    def _word(self, tokens: Sequence[int]) -> str:
        return self.types[tokens[0]]

    def _body(self) -> bytes:
        return "\n".join(self.types).encode()


class PieceVocabulary(Vocabulary):
    """SentencePiece tokens (BPE or unigram) inside words, with bytes for unknown characters.

    WikiText's `<unk>` is one token. Every text can be encoded without loss except that the
    character U+2581, SentencePiece's own space, becomes `_`.
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
        self.starts_word = np.array([piece.startswith(_SPACE) for piece in pieces])
        self.starts_word[[self.unk_id, self.eos_id]] = True
        self._bytes = [
            bytes([int(piece[3:5], 16)])
            if self._processor.is_byte(index)
            else piece.removeprefix(_SPACE).encode()
            for index, piece in enumerate(pieces)
        ]
        self._known = {UNK: (self.unk_id,)}

    def _encode_word(self, word: str) -> tuple[int, ...]:
        tokens = tuple(self._processor.encode(word.replace(_SPACE, "_"), out_type=int))
        if len(self._known) < _CACHED_WORDS:
            self._known[word] = tokens
        return tokens

    def _word(self, tokens: Sequence[int]) -> str:
        return b"".join(self._bytes[token] for token in tokens).decode("utf-8", "replace")

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
        words = article.text.split()
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
            if word != UNK and "\0" not in word:
                yield f"{word.replace(_SPACE, '_')}\t{count}"

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
