"""Articles -> tokens: memory-mapped token files, built once from a corpus and a vocabulary."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm.base.errors import UserError
from mlm.base.files import atomic_path
from mlm.base.names import EOS
from mlm.base.processes import ranks
from mlm.base.terminal import note, progress_bar
from mlm.text.corpora import Article, Corpus, count_words
from mlm.text.encoding import encode_articles, token_dtype
from mlm.text.vocabulary import UNK, Unknown, Vocabulary, fit_vocabulary, load_vocabulary

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = [
    "EOS",
    "UNK",
    "DamagedFile",
    "Prepared",
    "TokenFile",
    "Vocabulary",
    "encode_split",
    "fit_vocabulary",
    "load_vocabulary",
    "prepare",
    "shared_articles",
    "source_hash",
    "write_token_file",
]


_FORMAT = 2


_KEY = 1  # counts up when the same text gets another vocabulary


_MAGIC = b"mlmtoken"


_PREFIX = struct.Struct("<8sIIQQ")  # magic, format, CRC of the header, header's offset, file size


class DamagedFile(UserError):
    """A token file that is missing, half-written or truncated; `prepare` builds it again."""


class TokenFile:
    """The tokens of one split, memory-mapped.

    tokens: uint16 or uint32 (N,); offsets: int64 (A+1,), article a is tokens[offsets[a]:
    offsets[a+1]]; titles: A strings; words, bytes: int64 (A,), words (as `count_words`) and bytes
    (of the canonical text or spelling) of each article. unknown: the words that the vocabulary does
    not hold, by their places in `tokens`. vocabulary_hash, source_hash: what made the file.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`; raises `DamagedFile` unless it is whole and its checksums hold."""
        self.path = Path(path)
        header = self._header()
        count, number = header["tokens"], header["articles"]
        dtype = np.dtype(header["dtype"])
        start = _PREFIX.size
        tokens = np.memmap(self.path, dtype=dtype, mode="r", offset=start, shape=(count,))
        self.tokens: np.ndarray = tokens
        start += count * dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(start)
            table = file.read((3 * number + 1 + 2 * header["unknown"]) * 8)
            names = file.read(header["titles"])
        if header["crc"] != zlib.crc32(names, zlib.crc32(table, zlib.crc32(tokens.data))):
            raise DamagedFile(f"{self.path}: its checksum does not match its content")
        numbers = np.frombuffer(table, dtype=np.int64)
        self.offsets = numbers[: number + 1]
        self.words = numbers[number + 1 : 2 * number + 1]
        self.bytes = numbers[2 * number + 1 : 3 * number + 1]
        self.unknown = Unknown(*numbers[3 * number + 1 :].reshape(2, -1))
        self.titles: list[str] = json.loads(names)
        self.vocabulary_hash: str = header["vocabulary"]
        self.source_hash: str = header["source"]

    def _header(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                magic, version, crc, offset, size = _PREFIX.unpack(file.read(_PREFIX.size))
                actual = os.fstat(file.fileno()).st_size
                file.seek(offset)
                header = file.read()
        except (OSError, ValueError, struct.error) as error:
            raise DamagedFile(f"{self.path}: {error}") from None
        if magic != _MAGIC or version != _FORMAT:
            raise DamagedFile(f"{self.path}: no token file of format {_FORMAT}")
        if size != actual or crc != zlib.crc32(header):  # the header is the end of the file
            raise DamagedFile(f"{self.path}: {actual} of {size} bytes, cut short or overwritten")
        return json.loads(header)

    def __len__(self) -> int:
        return len(self.titles)

    @property
    def total_words(self) -> int:
        """Words of all articles, `<eos>` included."""
        return int(self.words.sum())

    def article(self, index: int) -> np.ndarray:
        """Tokens int32 (T,) of article `index`, a copy."""
        return np.array(self.tokens[self.offsets[index] : self.offsets[index + 1]], dtype=np.int32)

    def unknown_in(self, index: int) -> Unknown:
        """The unknown words of article `index`, by their places in it."""
        start, stop = self.offsets[index : index + 2]
        low, high = np.searchsorted(self.unknown.at, [start, stop])
        return Unknown(self.unknown.at[low:high] - start, self.unknown.bytes[low:high])


def write_token_file(
    path: Path,
    articles: Iterable[Article],
    vocabulary: Vocabulary,
    source_hash: str,
    progress: tqdm | None = None,
) -> TokenFile:
    """Encode `articles` into the token file `path`, atomically, and open it."""
    titles: list[str] = []
    lengths: list[int] = []
    words: list[int] = []
    sizes: list[int] = []
    unknown: list[Unknown] = []
    crc, at = 0, 0
    encoded = encode_articles(articles, vocabulary, path.parent)
    with (
        contextlib.closing(encoded),  # stop the workers at once if writing fails
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
    ):
        file.write(bytes(_PREFIX.size))
        for names, batch in encoded:
            data = batch.tokens.tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)
            titles += names
            lengths += batch.lengths
            words += batch.words
            sizes += batch.bytes
            unknown.append(Unknown(batch.unknown.at + at, batch.unknown.bytes))
            at += len(batch.tokens)
            if progress is not None:
                progress.update(sum(batch.words))
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        at_U, bytes_U = map(np.concatenate, zip(*unknown, strict=True)) if unknown else ([], [])
        table = np.concatenate([offsets, words, sizes, at_U, bytes_U]).astype(np.int64).tobytes()
        names_blob = json.dumps(titles).encode()
        file.write(table + names_blob)
        header = json.dumps(
            {
                "vocabulary": vocabulary.hash,
                "source": source_hash,
                "dtype": token_dtype(vocabulary).name,
                "tokens": int(offsets[-1]),
                "articles": len(titles),
                "unknown": len(at_U),
                "titles": len(names_blob),
                "crc": zlib.crc32(names_blob, zlib.crc32(table, crc)),
            }
        ).encode()
        start = file.tell()
        file.write(header)
        total = file.tell()
        file.seek(0)
        file.write(_PREFIX.pack(_MAGIC, _FORMAT, zlib.crc32(header), start, total))
    return TokenFile(path)


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens: its vocabulary, one token file per split, the folder they are in."""

    vocabulary: Vocabulary
    splits: dict[str, TokenFile]
    directory: Path


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_KEY, *parts]).encode()).hexdigest()


def source_hash(corpus: Corpus, split: str, max_words: int = 0) -> str:
    """Hash of a split's content, as its token file has it."""
    return _digest(corpus.fingerprint(split), max_words)


_LEAST = 20  # words of an article that no other has by chance


def shared_articles(one: TokenFile, other: TokenFile) -> list[str]:
    """Titles of the articles of `one` that `other` has, too, token for token; short ones apart."""

    def hashes(file: TokenFile) -> Iterator[tuple[str, bytes]]:
        for index in np.flatnonzero(file.words >= _LEAST):
            tokens = file.tokens[file.offsets[index] : file.offsets[index + 1]]
            yield file.titles[index], hashlib.blake2b(tokens.tobytes()).digest()

    there = {digest for _, digest in hashes(other)}
    return [title for title, digest in hashes(one) if digest in there]


def limited(articles: Iterable[Article], max_words: int) -> Iterator[Article]:
    """The first whole articles of up to `max_words` words together (at least one); 0 = all."""
    total = 0
    for index, article in enumerate(articles):
        total += count_words(article.text) if max_words else 0
        if total > max_words and index:
            return
        yield article


def _counted(articles: Iterable[Article], bar: tqdm) -> Iterator[Article]:
    for article in articles:
        bar.update(count_words(article.text))
        yield article


def _bar(title: str, progress: bool, total: int | None = None) -> tqdm:
    return progress_bar(title, total, unit="words", quiet=not progress)


def _split_file(
    path: Path,
    corpus: Corpus,
    split: str,
    vocabulary: Vocabulary,
    max_words: int,
    progress: bool,
    total: int | None = None,
) -> TokenFile:
    """The token file at `path` if it is whole and made from this source, else a new one."""
    source = source_hash(corpus, split, max_words)
    try:
        found = TokenFile(path)
        if (found.vocabulary_hash, found.source_hash) == (vocabulary.hash, source):
            return found
        why = f"{path} was made from another source or vocabulary"
    except DamagedFile as error:
        why = str(error)
    if path.exists():
        note(f"{why}; building it again")
    with _bar(f"{corpus.name} {split}: encoding", progress, total) as bar:
        articles = limited(corpus.articles(split), max_words)
        return write_token_file(path, articles, vocabulary, source, bar)


def prepare(
    corpus: Corpus,
    kind: str,
    size: int,
    cache_dir: Path,
    splits: Sequence[str] = ("train", "valid", "test"),
    max_train_words: int = 0,
    progress: bool = True,
) -> Prepared:
    """Vocabulary and token files of a corpus, from the cache below `cache_dir` or built anew.

    The vocabulary is fitted on the training split only. max_train_words: use only the first
    articles of up to so many words of that split, for the vocabulary too (0 = all). Raises
    `UserError` for bad text or a size that the text does not support. Of several processes the
    first makes what is not there, by one worker for each core.
    """
    own = (corpus, kind, size, cache_dir, splits, max_train_words)
    if ranks().world > 1:
        _made_by_first(lambda: _prepare(*own, progress))
    return _prepare(*own, progress)


def _made_by_first(make: Callable[[], object]) -> None:
    """Let the first of several processes make files, which all of them then find."""

    def act() -> None:
        make()

    ranks().on_first(act)


def _prepare(
    corpus: Corpus,
    kind: str,
    size: int,
    cache_dir: Path,
    splits: Sequence[str],
    max_train_words: int,
    progress: bool,
) -> Prepared:
    """What `prepare` does, in one process."""
    key = _digest(corpus.fingerprint("train"), kind, size, max_train_words)[:12]
    directory = Path(cache_dir) / f"{corpus.name}-{key}"
    vocabulary: Vocabulary | None = None
    if (directory / "vocabulary.model").exists():
        try:
            vocabulary = load_vocabulary(directory)
        except UserError as error:
            note(f"{error}; fitting it again")
    train_words: int | None = None  # for the progress bar
    if vocabulary is None:
        with _bar(f"{corpus.name}: fitting the vocabulary", progress) as bar:
            train = limited(corpus.articles("train"), max_train_words)
            vocabulary = fit_vocabulary(_counted(train, bar), kind, size)
            train_words = int(bar.n) or None
        vocabulary.save(directory)
    files = {}
    for split in splits:
        limit, total = (max_train_words, train_words) if split == "train" else (0, None)
        path = directory / f"{split}.tokens"
        files[split] = _split_file(path, corpus, split, vocabulary, limit, progress, total)
    return Prepared(vocabulary, files, directory)


def encode_split(
    corpus: Corpus,
    split: str,
    vocabulary: Vocabulary,
    cache_dir: Path,
    max_words: int = 0,
    progress: bool = True,
) -> TokenFile:
    """Token file of one split with an existing vocabulary, such as for another corpus.

    Its folder is named after the content: two texts of one name have a folder each.

    max_words: only the first articles of up to so many words (0 = all).
    """
    key = _digest(corpus.fingerprint(split), max_words, vocabulary.hash)[:12]
    path = Path(cache_dir) / f"{corpus.name}-{key}" / f"{split}.tokens"
    own = (path, corpus, split, vocabulary, max_words, progress)
    if ranks().world > 1:
        _made_by_first(lambda: _split_file(*own))
    return _split_file(*own)
