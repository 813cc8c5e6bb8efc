"""What is counted is what is encoded: words and bytes are those that tokens spell."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.base.errors import UserError, run_cli
from mlm.spelling import canonical_text
from mlm.text import encoding
from mlm.text.articles import Article, count_words
from mlm.text.encoding import encode_articles
from mlm.text.tokens import write_token_file
from mlm.text.vocabulary import PieceVocabulary, Vocabulary, WordVocabulary, fit_vocabulary

SIZES = {"bpe": 300, "unigram": 276, "word": 0}
ODD = (
    "\u00a0\u200b\u2581\u0301\u2028\u2029\u0085\r\t\x0b\x1c\x00\ufeff\u3000\u00adﬁÅÅ²"
    "\U0001f9ed\U0001f469\u200d\U0001f680水ქα\ue000\uffff\U0010ffff\ud800\udfff"
)
PARTS = ("<unk>", "<eos>", "<s>", "<0x41>", " ", "  ", "\n", "a", "lamp", "é", "e\u0301", *ODD)
texts = st.lists(st.sampled_from(PARTS) | st.characters(), max_size=40).map("".join)


@functools.cache
def vocabulary(kind: str) -> Vocabulary:
    text = "a lamp burns and a keeper naps \n" * 20 + "one keeper walks to sea <unk> \n" * 5
    return fit_vocabulary([Article("t", text)], kind, SIZES[kind])


def encoded(kind: str, text: str):
    ((_, batch),) = encode_articles([Article("t", text)], vocabulary(kind), Path())
    return batch


@given(texts, st.sampled_from(sorted(SIZES)))
def test_words_and_bytes_are_those_of_the_canonical_text(text: str, kind: str) -> None:
    batch, spelled = encoded(kind, text), canonical_text(text)
    assert batch.words == [count_words(text)] == [count_words(spelled)]
    assert batch.bytes == [len(spelled.encode())]
    if kind != "word":
        assert vocabulary(kind).decode(batch.tokens) == spelled
        assert not len(batch.unknown.at)


@given(texts)
def test_unknown_words_are_spelled_and_no_others(text: str) -> None:
    batch, words = encoded("word", text), vocabulary("word")
    tokens = [[*line.split(), None] for line in canonical_text(text).split("\n")[:-1]]
    flat = [word for line in tokens for word in line]
    known = {"<unk>", *["a", "lamp", "burns", "and", "keeper", "naps", "one", "walks", "to", "sea"]}
    unknown = [k for k, word in enumerate(flat) if word is not None and word not in known]
    assert batch.unknown.at.tolist() == unknown
    assert batch.unknown.bytes.tolist() == [len(flat[k].encode()) for k in unknown]
    assert batch.unknown.nats() == pytest.approx(
        math.log(257) * (np.array([len(flat[k].encode()) for k in unknown]) + 1)
    )
    assert (np.delete(batch.tokens, unknown) != words.unk_id).all() or "<unk>" in flat


SPACES = ("    ", "\t", "\u00a0", "\r", " \u2028 ", "\x85\u3000")


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("space", SPACES)
def test_white_space_does_not_pay(kind: str, space: str) -> None:
    text = "a lamp burns\n\nthe étude \u2581x naps\n"
    wide = f"{space}" + text.replace(" ", space).replace("\n", f"{space}\n")
    one, other = encoded(kind, text), encoded(kind, wide)
    assert (one.bytes, one.words) == (other.bytes, other.words)
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.bytes == [len("a lamp burns\n\nthe étude _x naps\n".encode())]


@given(st.lists(texts, max_size=5))
def test_a_token_file_keeps_every_articles_unknown_words(parts: list[str]) -> None:
    import tempfile

    articles = [Article(f"{k}", text) for k, text in enumerate(parts)]
    with tempfile.TemporaryDirectory() as folder:
        file = write_token_file(Path(folder) / "x.tokens", articles, vocabulary("word"), "source")
        for k, text in enumerate(parts):
            mine, alone = file.unknown_in(k), encoded("word", text).unknown
            assert mine.at.tolist() == alone.at.tolist()
            assert mine.bytes.tolist() == alone.bytes.tolist()


def test_natural_spelling_counts_its_own_bytes() -> None:
    article = Article("t", "well @-@ kept \n", canonical_bytes=10)
    ((_, batch),) = encode_articles([article], vocabulary("bpe"), Path())
    assert batch.bytes == [10]


def test_a_vocabulary_that_spells_another_text_is_refused() -> None:
    lame = fit_vocabulary([Article("t", "a lamp naps \n" * 20)], "word", 0)
    lame.starts_word = lame.starts_word.copy()
    lame.starts_word[lame.encode_line("lamp")] = False
    with pytest.raises(UserError, match=r"article 'Sea': its tokens spell 3 words and 11 bytes"):
        list(encode_articles([Article("Sea", "a lamp naps \n")], lame, Path()))


# ---------------------------------------------------------------- words of any length


@pytest.mark.parametrize(("kind", "size"), [("bpe", 268), ("unigram", 265)])
def test_long_words_are_learned_from_and_leave_the_marker(kind: str, size: int) -> None:
    """SentencePiece alone skips rows of over 4,192 bytes and drops a marker this rare."""
    pair = "水鳥山川"
    articles = [Article("t", pair * 3000 + "\n")] * 3
    found = fit_vocabulary(articles, kind, size)
    assert len(found.encode_line(pair * 100)) < 200, "its characters are pieces"
    assert found.starts_word[found.encode_line("β")[0]]
    nul = fit_vocabulary([Article("t", "lamp\0lamp \n" * 50)], kind, 264)
    assert not set(nul.encode_line("lamp")) & set(nul.noise[:256].tolist())


def test_a_vocabulary_without_the_marker_is_refused() -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["x" * 4000] * 3), model_writer=model, model_type="bpe",
        vocab_size=259, byte_fallback=True, unk_piece="<unk>", bos_id=-1, pad_id=-1, eos_id=1,
        unk_id=0, hard_vocab_limit=False, add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="marker of a word's start"):
        PieceVocabulary("bpe", model.getvalue())


def test_noise_is_bytes_in_words() -> None:
    pieces = vocabulary("bpe")
    assert isinstance(pieces, PieceVocabulary)
    spelled = {pieces.decode([int(t)]) for t in pieces.noise}
    assert len(set(pieces.noise.tolist())) == 257
    assert {"", "A"} <= spelled
    assert (~pieces.starts_word[pieces.noise]).mean() == pytest.approx(8 / 9)
    assert not len(vocabulary("word").noise)


class _Dead:
    """An executor whose workers are dead."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, *_: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_exception(BrokenProcessPool("dead"))
        return future

    def shutdown(self, **_: object) -> None:
        pass


@pytest.mark.parametrize("signalled", [True, False])
def test_a_signal_that_reaches_the_workers_first_is_an_interruption(
    signalled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a group of processes; without a signal here the workers were killed."""
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", _Dead)
    monkeypatch.setattr(encoding, "_ALONE", 1)
    monkeypatch.setattr(encoding, "_BATCH", 1)
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    monkeypatch.setattr(encoding, "_LATE", 0.2)
    vocabulary = WordVocabulary(["<unk>", "<eos>", "a"])
    texts = iter([Article("A", "a a\n"), Article("B", "a\n")])

    def encode() -> None:
        if signalled:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        list(encoding.encode_articles(texts, vocabulary, Path("nowhere")))

    monkeypatch.setattr(WordVocabulary, "save", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        run_cli(encode)
    said = capsys.readouterr().err
    assert stop.value.code == (143 if signalled else 1)
    assert said.startswith("interrupted by SIGTERM" if signalled else "error: a process that was")
