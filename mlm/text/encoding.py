"""Articles -> token arrays, by one process per core where the text is large enough to pay."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm.base.errors import UserError
from mlm.spelling import canonical_text
from mlm.text.articles import Article, count_words
from mlm.text.vocabulary import Unknown, Vocabulary, load_vocabulary

_BATCH = 1 << 20  # characters encoded at a time


_LATE = 1.0  # seconds that a signal to this process may come after one to its workers


_ALONE = 32  # batches encoded before it pays to start other processes


def token_dtype(vocabulary: Vocabulary) -> np.dtype:
    """Smallest unsigned type that holds the tokens of `vocabulary`: uint16 or uint32."""
    return np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)


class Encoded(NamedTuple):
    """A batch of encoded articles: their tokens end to end, and what each of them holds."""

    tokens: np.ndarray
    lengths: list[int]
    words: list[int]
    bytes: list[int]
    unknown: Unknown


def _encode_batch(vocabulary: Vocabulary, articles: Sequence[Article]) -> Encoded:
    dtype = token_dtype(vocabulary)
    arrays = [vocabulary.encode_article(article.text).astype(dtype) for article in articles]
    lengths = [len(array) for array in arrays]
    words = [int(vocabulary.starts_word[array].sum()) for array in arrays]
    parts = [vocabulary.unknown(a.text, array) for a, array in zip(articles, arrays, strict=True)]
    sizes = list(map(_counted_bytes, itertools.repeat(vocabulary), articles, arrays, parts))
    starts = np.cumsum([0, *lengths[:-1]])
    at = [part.at + start for part, start in zip(parts, starts, strict=True)]
    unknown = Unknown(np.concatenate(at), np.concatenate([part.bytes for part in parts]))
    return Encoded(np.concatenate(arrays), lengths, words, sizes, unknown)


def _counted_bytes(
    vocabulary: Vocabulary, article: Article, tokens: np.ndarray, unknown: Unknown
) -> int:
    """The bytes that count, of an article whose tokens spell exactly its canonical text.

    Raises:
        UserError: they spell another number of words or bytes.
    """
    size = len(canonical_text(article.text).encode())
    spelled = int(vocabulary.starts_word[tokens].sum()), vocabulary.spelled_bytes(tokens, unknown)
    if spelled != (count_words(article.text), size):
        raise UserError(
            f"article {article.title!r}: its tokens spell {spelled[0]:,} words and {spelled[1]:,} "
            f"bytes, but it has {count_words(article.text):,} and {size:,}; its vocabulary is not "
            "one of this program. Delete its folder and run again"
        )
    return size if article.canonical_bytes is None else article.canonical_bytes


_worker_vocabulary: Vocabulary | None = None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker(directory: str) -> None:
    global _worker_vocabulary
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_vocabulary = load_vocabulary(Path(directory))


def _work(articles: Sequence[Article]) -> Encoded:
    assert _worker_vocabulary is not None
    return _encode_batch(_worker_vocabulary, articles)


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
    """Let spawned workers start without running the caller's script again, deaf to Ctrl-C."""
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    masks = hasattr(signal, "pthread_sigmask")
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    try:
        main.__spec__ = None
        if "__file__" in hidden:
            del main.__file__
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
        if previous is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _batches(articles: Iterable[Article], size: int) -> Iterator[list[Article]]:
    """Group articles into batches of about `size` characters."""
    batch: list[Article] = []
    total = 0
    for article in articles:
        batch.append(article)
        total += len(article.text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def encode_articles(
    articles: Iterable[Article],
    vocabulary: Vocabulary,
    directory: Path,
) -> Generator[tuple[list[str], Encoded], None, None]:
    """Encode in order: the first `_ALONE` batches here, the rest by one process per core.

    At most three batches per process are in flight, so memory does not grow with the text.
    """
    batches = _batches(articles, _BATCH)
    cores = min(_cores(), 16)
    for done, batch in enumerate(batches, 1):
        yield [a.title for a in batch], _encode_batch(vocabulary, batch)
        if done == _ALONE and cores > 1:
            break
    first = next(batches, None)
    if first is None:
        return
    vocabulary.save(directory)
    pool = ProcessPoolExecutor(
        cores,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(directory),),
    )
    waiting: deque[tuple[list[str], Future[Encoded]]] = deque()

    def submit(batch: list[Article]) -> None:
        with _starting_workers():
            future = pool.submit(_work, batch)
        waiting.append(([article.title for article in batch], future))

    try:
        for batch in itertools.chain([first], batches):
            submit(batch)
            if len(waiting) >= 3 * cores:
                titles, future = waiting.popleft()
                yield titles, future.result()
        while waiting:
            titles, future = waiting.popleft()
            yield titles, future.result()
    except BrokenProcessPool:
        # A signal to all processes of a group may reach the workers first: let it arrive here.
        time.sleep(_LATE)
        raise UserError(
            "a process that was encoding text was killed, most likely for want of memory. "
            "Free some memory and run again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
