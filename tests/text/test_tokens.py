"""Vocabularies and token files: lossless, word for word, and never half-written."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mlm.base.errors import UserError
from mlm.spelling import canonical_text
from mlm.text import encoding
from mlm.text.corpora import SPLITS, Article, Corpus, count_words, open_corpus, split_articles
from mlm.text.tokens import (
    DamagedFile,
    TokenFile,
    Vocabulary,
    encode_split,
    fit_vocabulary,
    load_vocabulary,
    prepare,
    write_token_file,
)

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"bpe": 360, "unigram": 300, "word": 0}
SENTENCE = (
    "the keeper of a small light house walks to sea each night ; his lamp , made from brass "
    "shines over waves until morning comes <unk> @-@ 1 @,@ 000 ships passed him safely"
)
WORDS = SENTENCE.split()


def text_of(title: str, seed: int, lines: int = 20) -> str:
    """An article of made-up sentences in WikiText's form."""
    random = np.random.default_rng(seed)
    body = [" ".join(random.choice(WORDS, size=12)) for _ in range(lines)]
    return f" \n = {title} = \n \n" + "".join(f" {line} . \n" for line in body)


def articles_of(count: int, seed: int = 0) -> list[Article]:
    text = "".join(text_of(f"Night {seed + i}", seed + i) for i in range(count))
    return list(split_articles(text.splitlines()))


@pytest.fixture(scope="module")
def vocabularies() -> dict[str, Vocabulary]:
    return {kind: fit_vocabulary(articles_of(30), kind, size) for kind, size in KINDS.items()}


@pytest.fixture(params=KINDS)
def vocabulary(request: pytest.FixtureRequest, vocabularies: dict[str, Vocabulary]) -> Vocabulary:
    return vocabularies[request.param]


def corpus_at(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for seed, split in enumerate(SPLITS):
        text = "".join(a.text for a in articles_of(30 if split == "train" else 5, 100 * seed))
        (path / f"{split}.txt").write_text(text)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return open_corpus(str(corpus_at(tmp_path / "lamp")))


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def normal(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


# ---------------------------------------------------------------- vocabularies

HOSTILE = [
    "",
    "\n",
    " \n\n \n",
    " = Lone = \n",
    "no line end",
    "one",
    " the keeper of <unk> light , <unk>s and <unk> \n",
    " emoji 😀 👩‍👩‍👧 and 漢字 é e\u0301 \U0010ffff \n",
    " control \x00 a\x00b \x01\x7f \ufeff \u200b \u2585 \ufffd \n",
    " spaces\u00a0of\u3000all\u2028kinds\x0b\x1c\x85here \t tab \r\n",
    " <eos> </s> <s> <pad> <0x41> \u2047 \n",
    " @-@ @,@ @.@ " + "x" * 10_000 + " \n",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_tokens_that_start_a_word_count_the_words(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.encode_article(text)
    assert tokens.dtype == np.int32
    assert tokens.ndim == 1
    assert vocabulary.starts_word[tokens].sum() == count_words(text)
    lines = text.split("\n")[:-1] if text.endswith("\n") else text.split("\n") if text else []
    assert (tokens == vocabulary.eos_id).sum() == len(lines)
    expected = [word for line in lines for word in [*line.split(), "<eos>"]]
    assert len(vocabulary.words(tokens)) == len(expected)
    if vocabulary.kind != "word":
        assert vocabulary.words(tokens) == expected
        assert vocabulary.decode(tokens) == "".join(" ".join(x.split()) + "\n" for x in lines)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_space_mark_becomes_an_underscore(
    vocabularies: dict[str, Vocabulary], kind: str
) -> None:
    vocabulary = vocabularies[kind]
    text = " \u2581 a\u2581b \u2581\u2581the \n"
    tokens = vocabulary.encode_article(text)
    assert vocabulary.starts_word[tokens].sum() == count_words(text) == 4
    assert vocabulary.decode(tokens) == "_ a_b __the\n"
    trained = fit_vocabulary([Article("T", text * 50 + text_of("T", 1))], kind, 300)
    assert trained.decode(trained.encode_article(text)) == "_ a_b __the\n"


def test_text_survives_encoding(vocabulary: Vocabulary) -> None:
    for article in articles_of(3, seed=50):
        tokens = vocabulary.encode_article(article.text)
        if vocabulary.kind == "word":  # the title's number is a new word
            assert vocabulary.decode(tokens) == normal(
                article.text.replace(article.title, "Night <unk>")
            )
        else:
            assert vocabulary.decode(tokens) == normal(article.text)


def test_marks_are_single_tokens(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode_line(" <unk> ") == [vocabulary.unk_id]
    assert vocabulary.encode_article("\n").tolist() == [vocabulary.eos_id]
    assert vocabulary.words([vocabulary.unk_id, vocabulary.eos_id]) == ["<unk>", "<eos>"]
    assert vocabulary.starts_word.shape == (vocabulary.size,)
    assert vocabulary.starts_word.dtype == bool
    # A word of the text spelled as the mark is no line end: nothing may cut a line in two.
    assert vocabulary.eos_id not in vocabulary.encode_line("a <eos> b")


def test_words_of_a_segment_cut_inside_a_word(vocabularies: dict[str, Vocabulary]) -> None:
    vocabulary = vocabularies["bpe"]
    tokens = vocabulary.encode_article("zebra the\n").tolist()
    assert vocabulary.words(tokens) == ["zebra", "the", "<eos>"]
    cut = vocabulary.words(tokens[2:])
    assert "zebra".endswith(cut[0])
    assert cut[1:] == ["the", "<eos>"]
    assert vocabulary.words([]) == []


def test_word_vocabulary_is_all_types_by_falling_frequency() -> None:
    text = " = b = \n \n b b c c a \n d <unk> <unk> <unk> \n"
    vocabulary = fit_vocabulary([Article("b", text)], "word", 0)
    #  <eos> 4, b 3, <unk> 3, = 2, c 2, a 1, d 1; first seen first among equals
    order = [vocabulary.decode([i]) for i in range(vocabulary.size)]
    assert order == ["\n", "b", "<unk>", "=", "c", "a", "d"]
    assert vocabulary.encode_line("d new b") == [6, vocabulary.unk_id, 1]


def test_word_vocabulary_of_limited_size() -> None:
    text = " = b = \n \n b b c c a d \n"
    vocabulary = fit_vocabulary([Article("b", text)], "word", 4)
    assert [vocabulary.decode([i]) for i in range(4)] == ["b", "\n", "=", "<unk>"]
    everything = fit_vocabulary([Article("b", text)], "word", 0)
    assert everything.size == 7  # <unk>, missing in the text, is there all the same
    message = error_of(lambda: fit_vocabulary([Article("b", text)], "word", 8))
    assert "--vocabulary-size 8" in message
    assert "at most 7" in message


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_size_the_text_does_not_support(kind: str) -> None:
    articles = articles_of(2)
    message = error_of(lambda: fit_vocabulary(articles, kind, 50_000))
    assert "--vocabulary-size 50000" in message
    largest = int(message.split()[-1])
    assert fit_vocabulary(articles, kind, largest).size == largest
    message = error_of(lambda: fit_vocabulary(articles, kind, 100))
    assert "--vocabulary-size 100" in message
    smallest = int(message.split()[-1])
    assert 258 < smallest <= largest
    assert fit_vocabulary(articles, kind, smallest).size == smallest


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_unknown_words_teach_no_pieces(kind: str) -> None:
    text = text_of("Night", 1)
    without = text.replace("<unk>", "")
    fitted = [fit_vocabulary([Article("Night", t)], kind, 290).hash for t in (text, without)]
    assert fitted[0] == fitted[1]


def test_an_unknown_kind_of_vocabulary_is_refused() -> None:
    assert "'letters'" in error_of(lambda: fit_vocabulary(articles_of(1), "letters", 300))


def test_fitting_is_deterministic_and_silent(
    vocabulary: Vocabulary, capfd: pytest.CaptureFixture[str]
) -> None:
    again = fit_vocabulary(articles_of(30), vocabulary.kind, KINDS[vocabulary.kind])
    other = fit_vocabulary(articles_of(30, 500), vocabulary.kind, KINDS[vocabulary.kind])
    assert again.hash == vocabulary.hash
    assert other.hash != vocabulary.hash
    assert capfd.readouterr() == ("", "")


def test_save_and_load(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "run")
    loaded = load_vocabulary(tmp_path / "run")
    assert (loaded.kind, loaded.size, loaded.hash) == (
        vocabulary.kind,
        vocabulary.size,
        vocabulary.hash,
    )
    for text in HOSTILE:
        assert np.array_equal(loaded.encode_article(text), vocabulary.encode_article(text))


def test_damaged_vocabulary(vocabulary: Vocabulary, tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(lambda: load_vocabulary(tmp_path))
    vocabulary.save(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[: len(whole) // 2], whole[:-1], b"x" + whole):
        path.write_bytes(damaged)
        message = error_of(lambda: load_vocabulary(tmp_path))
        assert f"{path} is damaged" in message


# ---------------------------------------------------------------- token files


def test_token_file_holds_the_articles(vocabulary: Vocabulary, tmp_path: Path) -> None:
    articles = [*articles_of(4), Article("é", " = é = \n"), Article("empty", "")]
    file = write_token_file(tmp_path / "x.tokens", articles, vocabulary, "source")
    assert len(file) == 6
    assert file.titles == [a.title for a in articles]
    for index, article in enumerate(articles):
        tokens = file.article(index)
        assert tokens.dtype == np.int32
        assert np.array_equal(tokens, vocabulary.encode_article(article.text))
        assert file.words[index] == count_words(article.text)
        assert file.bytes[index] == len(canonical_text(article.text).encode())
    assert file.total_words == sum(count_words(a.text) for a in articles)
    assert file.offsets[-1] == len(file.tokens)
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.dtype == np.uint16
    assert (file.vocabulary_hash, file.source_hash) == (vocabulary.hash, "source")


def test_large_vocabulary_needs_wide_tokens(tmp_path: Path) -> None:
    text = " = Many = \n \n" + " ".join(f"w{i}" for i in range(70_000)) + "\n"
    vocabulary = fit_vocabulary([Article("Many", text)], "word", 0)
    file = write_token_file(tmp_path / "x", [Article("Many", text)], vocabulary, "")
    assert file.tokens.dtype == np.uint32
    assert vocabulary.decode(file.article(0)) == normal(text)


def test_any_damage_is_noticed(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    write_token_file(path, articles_of(2), vocabulary, "")
    whole = path.read_bytes()
    with pytest.raises(DamagedFile):
        TokenFile(tmp_path / "missing")
    for length in (0, 10, 32, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            TokenFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamagedFile):
        TokenFile(path)
    for place in range(0, len(whole), len(whole) // 40):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DamagedFile):
            TokenFile(path)
    path.write_bytes(whole)
    TokenFile(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_interrupted_writing_leaves_nothing(
    vocabulary: Vocabulary, tmp_path: Path, error: BaseException
) -> None:
    def broken() -> Iterator[Article]:
        yield from articles_of(3)
        raise error

    path = tmp_path / "x.tokens"
    with pytest.raises(type(error)):
        write_token_file(path, broken(), vocabulary, "")
    assert list(tmp_path.iterdir()) == []
    whole = write_token_file(path, articles_of(1), vocabulary, "")
    with pytest.raises(type(error)):
        write_token_file(path, broken(), vocabulary, "")
    assert list(tmp_path.iterdir()) == [path]
    assert TokenFile(path).titles == whole.titles


def test_processes_only_make_it_faster(
    vocabularies: dict[str, Vocabulary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles = articles_of(60)
    one = write_token_file(tmp_path / "one", articles, vocabularies["bpe"], "")
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]  # no process, no vocabulary for it
    monkeypatch.setattr(encoding, "_ALONE", 1)
    monkeypatch.setattr(encoding, "_BATCH", 3000)
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    write_token_file(tmp_path / "two", articles, vocabularies["bpe"], "")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert (tmp_path / "vocabulary.model").exists()
    assert one.titles == [a.title for a in articles]


# A script without the usual `if __name__ == "__main__"` must not be run again by each process.
SCRIPT = """
import sys
from pathlib import Path
from mlm.text import encoding, open_corpus, prepare

print("started", flush=True)
encoding._ALONE, encoding._BATCH, encoding._cores = 1, 2000, lambda: 2
corpus = open_corpus(sys.argv[1])
whole = corpus.articles

def endless(split):
    for round in range(10**9):
        print("reading", flush=True)
        yield from whole(split)

if sys.argv[3] == "endless":
    corpus.articles = lambda split: endless(split) if split == "valid" else whole(split)
print(prepare(corpus, "word", 0, Path(sys.argv[2]), progress=False).splits["train"].total_words)
"""


def script(tmp_path: Path, mode: str, *how: str) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, *how, corpus_at(tmp_path / "lamp"), tmp_path / "cache", mode],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def test_processes_leave_the_script_alone(tmp_path: Path) -> None:
    with script(tmp_path, "whole", "-m", "script") as process:
        out, err = process.communicate(timeout=60)
    words = sum(count_words(a.text) for a in articles_of(30))
    assert (out, err) == (f"started\n{words}\n", "")


def group_members(group: int) -> int:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return 0
    return 1


@pytest.mark.parametrize(
    "stop", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_stopping_leaves_no_process_and_no_half_file(tmp_path: Path, stop: signal.Signals) -> None:
    """Ctrl-C reaches the whole group; a kill only the parent."""
    with script(tmp_path, "endless", "script.py") as process:
        assert process.stdout is not None
        for _ in range(200):  # by then both processes work
            process.stdout.readline()
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)
        else:
            process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -stop
    if stop == signal.SIGINT:
        assert err.count("KeyboardInterrupt") == 1  # the parent's, none from the others
        (cache,) = (tmp_path / "cache").iterdir()
        assert sorted(p.name for p in cache.iterdir()) == ["train.tokens", "vocabulary.model"]
    deadline = time.monotonic() + 10
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_members(process.pid)


# ---------------------------------------------------------------- a corpus, prepared


def tokens_below(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(cache.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_builds_once(corpus: Corpus, tmp_path: Path, kind: str) -> None:
    first = prepare(corpus, kind, KINDS[kind], tmp_path / "cache", progress=False)
    assert list(first.splits) == list(SPLITS)
    for split in SPLITS:
        for index, article in enumerate(corpus.articles(split)):
            expected = first.vocabulary.encode_article(article.text)
            assert np.array_equal(first.splits[split].article(index), expected)
    assert first.directory.parent == tmp_path / "cache"
    assert first.directory.name.startswith("lamp-")
    before = tokens_below(tmp_path / "cache")
    second = prepare(corpus, kind, KINDS[kind], tmp_path / "cache", progress=False)
    assert tokens_below(tmp_path / "cache") == before
    assert second.vocabulary.hash == first.vocabulary.hash
    assert second.splits["test"].titles == first.splits["test"].titles


def test_vocabulary_knows_training_text_only(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "lamp" / "valid.txt"
    path.write_text(path.read_text() + " heldout \n")
    prepared = prepare(corpus, "word", 0, tmp_path / "cache", progress=False)
    tokens = prepared.splits["valid"].article(4)
    assert prepared.vocabulary.words(tokens)[-2:] == ["<unk>", "<eos>"]


def test_only_some_of_the_training_text(corpus: Corpus, tmp_path: Path) -> None:
    articles = list(corpus.articles("train"))
    words = [count_words(a.text) for a in articles]
    limit = words[0] + words[1] + words[2] - 1

    def prepared(limit: int) -> list[str]:
        return (
            prepare(corpus, "word", 0, tmp_path / "cache", ["train"], limit, progress=False)
            .splits["train"]
            .titles
        )

    assert prepared(limit) == [a.title for a in articles[:2]]
    assert prepared(limit + 1) == [a.title for a in articles[:3]]
    assert prepared(1) == [articles[0].title]  # at least one
    some = prepare(corpus, "word", 0, tmp_path / "cache", ["valid"], limit, progress=False)
    assert len(some.splits["valid"]) == 5
    assert some.vocabulary.encode_line(articles[1].title)[-1] != some.vocabulary.unk_id
    assert some.vocabulary.encode_line(articles[2].title)[-1] == some.vocabulary.unk_id
    every = prepare(corpus, "word", 0, tmp_path / "cache", ["valid"], progress=False)
    assert every.vocabulary.encode_line(articles[2].title)[-1] != every.vocabulary.unk_id


def test_changed_source_is_rebuilt(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prepare(corpus, "word", 0, tmp_path / "cache", progress=False)
    path = tmp_path / "lamp" / "test.txt"
    path.write_text(path.read_text().replace("keeper", "sleeper"))
    after = prepare(corpus, "word", 0, tmp_path / "cache", progress=False)
    assert after.vocabulary.hash == before.vocabulary.hash
    changed = after.vocabulary.encode_article(next(corpus.articles("test")).text)
    assert np.array_equal(after.splits["test"].article(0), changed)
    assert "made from another source" in capsys.readouterr().err
    path = tmp_path / "lamp" / "train.txt"
    path.write_text(path.read_text().replace("keeper", "sleeper"))
    last = prepare(corpus, "word", 0, tmp_path / "cache", progress=False)
    assert last.vocabulary.hash != before.vocabulary.hash
    assert last.vocabulary.encode_line("sleeper") != [last.vocabulary.unk_id]


@pytest.mark.parametrize("name", ["train.tokens", "vocabulary.model"])
@pytest.mark.parametrize("damage", ["truncated", "half-written"])
def test_damaged_cache_is_rebuilt(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    first = prepare(corpus, "bpe", KINDS["bpe"], tmp_path / "cache", progress=False)
    path = first.directory / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] if damage == "truncated" else bytes(64) + whole[64:])
    prepare(corpus, "bpe", KINDS["bpe"], tmp_path / "cache", progress=False)
    assert path.read_bytes() == whole
    message = capsys.readouterr().err
    assert f"note: {path}" in message or f"note: vocabulary {path}" in message
    assert "again" in message


def test_another_corpus_with_an_existing_vocabulary(
    vocabulary: Vocabulary, corpus: Corpus, tmp_path: Path
) -> None:
    file = encode_split(corpus, "valid", vocabulary, tmp_path / "cache", progress=False)
    for index, article in enumerate(corpus.articles("valid")):
        assert np.array_equal(file.article(index), vocabulary.encode_article(article.text))
    few = encode_split(corpus, "valid", vocabulary, tmp_path / "cache", 300, progress=False)
    assert 1 <= len(few) < 5
    before = tokens_below(tmp_path / "cache")
    encode_split(corpus, "valid", vocabulary, tmp_path / "cache", progress=False)
    encode_split(corpus, "valid", vocabulary, tmp_path / "cache", 300, progress=False)
    assert tokens_below(tmp_path / "cache") == before


def test_bad_text_leaves_no_token_file(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "lamp" / "valid.txt"
    path.write_bytes(path.read_bytes() + b"\xff")
    message = error_of(lambda: prepare(corpus, "word", 0, tmp_path / "cache", progress=False))
    assert "not valid UTF-8" in message
    (directory,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in directory.iterdir()) == ["train.tokens", "vocabulary.model"]


def test_progress_shows_words_per_second(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(corpus, "word", 0, tmp_path / "cache", progress=True)
    shown = capsys.readouterr().err
    for words in ("fitting the vocabulary", "train: encoding", "words/s"):
        assert words in shown
    prepare(corpus, "word", 0, tmp_path / "other", progress=False)
    assert capsys.readouterr().err == ""


def test_texts_of_one_name_have_a_folder_each(
    vocabulary: Vocabulary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By content: neither is encoded again when the other was."""
    files = []
    for _ in range(2):
        for place, text in (("a", "One old lamp."), ("b", "Two old lamps.")):
            path = tmp_path / place / "story.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            corpus = open_corpus(str(path), whole=True)
            file = encode_split(corpus, "valid", vocabulary, tmp_path / "cache", progress=False)
            files.append((file.path, file.path.stat().st_mtime_ns))
    assert files[0] == files[2]
    assert files[1] == files[3]
    assert files[0] != files[1]
    assert "again" not in capsys.readouterr().err


def test_a_header_beyond_any_file_is_damage(tmp_path: Path) -> None:
    """Its place, which no file system can seek to, or the size of the whole."""
    path = tmp_path / "far.tokens"
    path.write_bytes(struct.pack("<8sIIQQ", b"mlmtoken", 2, 0, 2**64 - 1, 40) + bytes(40))
    with pytest.raises(DamagedFile):
        TokenFile(path)
    head = struct.pack("<8sIIQQ", b"mlmtoken", 2, zlib.crc32(b"{}"), 32, 35)
    path.write_bytes(head + b"{}")
    with pytest.raises(DamagedFile, match="34 of 35 bytes"):
        TokenFile(path)
