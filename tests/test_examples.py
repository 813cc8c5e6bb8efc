"""Reading times: an effect that was planted is found, one that is not there is not, bad files."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import Command, Finished
from tiny import invented_words

from benchmarks.readme import engine
from examples.reading_times import BEFORE, Corpus, again, bare, counts_of, log_likelihood, usable

HEAD = "word\tzone\titem\tnItem\tmeanItemRT\tgmeanItemRT\n"
STORIES, WORDS = 5, 300


def own_bits(word: str) -> float:
    """A word's surprisal before anything was read."""
    return 2 + zlib.crc32(bare(word).encode()) % 1000 / 100


class Invented:
    """A model whose static surprisal is a word's own, and that learns what comes again."""

    def rules_in(self, protocol: str) -> tuple[str, ...]:
        """All it has; one of them in one protocol only."""
        return ("static", "learned", *(("learned+cache",) if protocol == "article" else ()))

    def resolved(self, rules: Sequence[str]) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(rules))

    def score_many(self, texts: list[str], rule: str, protocol: str) -> pa.Table:
        """The columns that the example reads."""
        rows: list[dict[str, Any]] = []
        seen: Counter[str] = Counter()
        for doc, text in enumerate(texts):
            if protocol == "article":
                seen.clear()
            at = sentence = 0
            for word in text.split(" "):
                bits = own_bits(word) / (1 if rule == "static" else 1 + seen[bare(word)])
                seen[bare(word)] += 1
                row = {"doc_id": doc, "char_start": at, "char_end": at + len(word)}
                rows.append(row | {"sent_id": sentence, "surprisal": bits})
                at += len(word) + 1
                sentence += word.endswith(".")
        return pa.Table.from_pylist(rows)


def write_times(path: Path, effect: float, seed: int = 0) -> Path:
    """Stories whose times rise with the surprisal, after learning, of a word and the one before."""
    rng = np.random.default_rng(seed)
    vocabulary = invented_words(60, rng)
    lines = []
    for story in range(1, STORIES + 1):
        own = rng.choice(vocabulary, 20)
        words = [str(word) + "." * (k % 9 == 8) for k, word in enumerate(rng.choice(own, WORDS))]
        bits = Invented().score_many([" ".join(words)], "learned", "article")["surprisal"]
        bits = bits.to_numpy()
        log_time = 5.8 + 0.02 * story + effect * (bits + 0.5 * np.roll(bits, 1))
        log_time += 0.01 * np.array([len(word) for word in words])
        log_time += 0.05 * rng.standard_normal(WORDS)
        for zone, (word, time) in enumerate(zip(words, np.exp(log_time), strict=True), 1):
            lines.append(f"{word}\t{zone}\t{story}\t80\t{time + 9}\t{time}\n")
    path.write_text(HEAD + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """Frequencies that say nothing."""
    path = tmp_path / "counts.tsv"
    path.write_text("the\t10\nThe\t2\nba\t3\n", encoding="utf-8")
    return path


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlm.load` gives the invented model."""
    monkeypatch.setattr("mlm.load", lambda name: Invented())


def run(command: Command, times: Path, counts: Path, *more: object) -> list[dict[str, Any]]:
    """The rows that the example writes."""
    out = times.with_name("reading_times.json")
    done = command(
        "examples.reading_times",
        *("--times", times, "--model", "some/model", "--frequencies", counts, "--json", out),
        *("--rules", "learned", *more),
    )
    assert done.code == 0, done.err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert str(times.parent) not in out.read_text(encoding="utf-8")
    assert found["settings"]["times"] == times.name
    rows = found["rows"]
    assert all(row["protocol"] in done.out for row in rows)
    page = engine(str(out))
    assert page[0].startswith("| protocol | rule | bits per word | nats per 1,000 words | over st")
    assert len(page) == len(rows) + 4
    return rows


@pytest.mark.usefixtures("model")
def test_a_planted_effect_is_found(command: Command, counts: Path, tmp_path: Path) -> None:
    rows = run(command, write_times(tmp_path / "times.tsv", effect=0.01), counts)
    found = {(row["protocol"], row["rule"]): row for row in rows}
    assert len(found) == len(rows) == 4
    static, learned = found["article", "static"], found["article", "learned"]
    assert learned["nats per 1,000 words interval"][0] > static["nats per 1,000 words"]
    assert learned["over static interval"][0] > 0
    difference = learned["nats per 1,000 words"] - static["nats per 1,000 words"]
    assert learned["over static"] == pytest.approx(difference)
    assert learned["bits per word"] < static["bits per word"]
    parts = learned["at words read before"], learned["at new words"]
    assert sum(parts) == pytest.approx(learned["over static"])
    assert learned["stories better"] == f"{STORIES} of {STORIES}"
    assert len(learned["over static by story"]) == STORIES
    # Times follow what is learned within a story: knowing the stories before makes it worse.
    stream = found["stream", "learned"]["nats per 1,000 words"]
    assert stream < learned["nats per 1,000 words"]


@pytest.mark.usefixtures("model")
def test_no_effect_is_not_found(command: Command, counts: Path, tmp_path: Path) -> None:
    times = write_times(tmp_path / "times.tsv", effect=0.0)
    rows = run(command, times, counts, "--protocols", "article", "--sentence-ends")
    assert [row["rule"] for row in rows] == ["static", "learned"]
    assert all(row["nats per 1,000 words"] < 2 for row in rows)


@pytest.mark.usefixtures("model")
def test_every_rule_of_every_model_is_read(command: Command, tmp_path: Path) -> None:
    """Those that have settings in a protocol; frequencies are counts of a corpus."""
    (tmp_path / "text").mkdir()
    text = " \n = One = \n \n It 's 5 @,@ 000 lamps , and it 's well @-@ lit . \n"
    (tmp_path / "text" / "train.txt").write_text(text, encoding="utf-8")
    counts = counts_of(str(tmp_path / "text"))
    assert (counts["it's"], counts["well-lit"], counts["5,000"], counts["@-@"]) == (2, 1, 1, 0)
    flags = ("--times", write_times(tmp_path / "times.tsv", effect=0.0), "--json", tmp_path / "j")
    done = command(
        "examples.reading_times",
        *(*flags, "--model", "one", "two", "--frequencies", tmp_path / "text"),
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "j").read_text(encoding="utf-8"))["rows"]
    labels = {"article": ["static", "learned", "learned + cache"], "stream": ["static", "learned"]}
    assert [(row["model"], row["protocol"], row["rule"]) for row in found] == [
        (model, protocol, rule)
        for model in ("one", "two")
        for protocol, rules in labels.items()
        for rule in rules
    ]


def test_a_trained_model_reads_the_stories(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """Every word is found in its table; frequencies are those of its output bias."""
    times = write_times(tmp_path / "times.tsv", effect=0.01)
    flags = ("--times", times, "--model", finished.folder, "--rules", "two_levels")
    done = command("examples.reading_times", *flags, "--protocols", "article")
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.startswith("protocol  rule")
    assert [line.split()[:2] for line in lines] == [
        ["article", "static"],
        ["article", "2"],
    ]


def test_likelihood_is_that_of_a_regression_on_the_other_stories() -> None:
    """Story by story, with an intercept per story, against the formula."""
    rng = np.random.default_rng(3)
    story = np.repeat([1, 2, 3], 20)
    X = rng.standard_normal((60, 2)) + story[:, None]
    y = X @ [0.3, -0.2] + story + 0.1 * rng.standard_normal(60)
    found = log_likelihood(X, y, story)
    for held in (1, 2, 3):
        others = [s for s in (1, 2, 3) if s != held]
        design = np.column_stack([X, *(story == s for s in others)])
        train, test = story != held, story == held
        weights = np.linalg.lstsq(design[train], y[train])[0]
        variance = np.square(y[train] - design[train] @ weights).mean()
        left = y[test] - X[test] @ weights[:2]
        left -= left.mean()
        expected = -0.5 * (np.log(2 * np.pi * variance) + left**2 / variance)
        assert found[test] == pytest.approx(expected)


def test_words_read_before_are_those_of_the_same_story() -> None:
    words = ["The", "mill", "the", "Mill,", "the", "old", "mill"]
    story = np.array([1, 1, 1, 1, 2, 2, 2])
    corpus = Corpus(words, np.arange(7), story, np.zeros(7))
    assert again(corpus).tolist() == [False, False, True, True, False, False, False]


def test_words_that_are_predicted() -> None:
    """Not the first two of a story, and none at the edge of a sentence."""
    story = np.array([1] * 7 + [2] * 5)
    sentence = np.array([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    assert BEFORE == 2
    assert np.flatnonzero(usable(story)).tolist() == [2, 3, 4, 5, 6, 9, 10, 11]
    assert np.flatnonzero(usable(story, sentence)).tolist() == [2, 5, 9, 10]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file"),
        (
            "word\tzone\nthe\t1\n",
            "it needs the tab-separated columns word, zone, item, gmeanItemRT",
        ),
        (HEAD + "the\t1\t1\t9\t300\tfast\n", "it needs the tab-separated columns"),
        (HEAD + "the\t1\t1\t9\t300\t300\n", "one story only"),
        (HEAD + "the\t1\t1\t9\t300\t300\nold\t1\t2\t9\t300\t0\n", "must be positive; line 3"),
        (HEAD + "the old\t1\t1\t9\t300\t300\nx\t1\t2\t9\t300\t300\n", "'the old' is not one word"),
        (
            HEAD + "".join(f"the\t1\t{story}\t9\t300\t300\n" for story in (1, 2, 1)),
            "must follow each other",
        ),
    ],
)
def test_a_bad_table_of_times(
    text: str | None, message: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "times.tsv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    done = command("examples.reading_times", "--times", path, "--model", "x")
    assert message in done.error


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("text", "message"), [(None, "no file"), ("the\tmany\n", "a word, a tab and its count")]
)
def test_bad_frequencies(text: str | None, message: str, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "counts.tsv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    times = write_times(tmp_path / "times.tsv", effect=0.0)
    flags = ("--times", times, "--model", "x", "--frequencies", path)
    assert message in command("examples.reading_times", *flags).error


@pytest.mark.parametrize(
    ("word", "plain"),
    [("Boar?'", "boar"), ("'It's", "it's"), ("—", "—"), ("so-called", "so-called")],
)
def test_words_as_frequencies_count_them(word: str, plain: str) -> None:
    assert bare(word) == plain
