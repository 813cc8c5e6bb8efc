"""`mlm score`: any text in, words and a summary out; bad input is refused before anything long."""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import Command, Finished, Outcome

import mlm
from mlm.cli import inputs
from mlm.reader import model as reader_model
from mlm.text.vocabulary import WordVocabulary

LETTER = """Dear Ba,

the dofe of the gila is closed, and the dofe of the gila is open again.
So the gila of Ku, which is 1,000 years old, is well-known.

Yours, La
"""
NOTES = "# Part one\n\n* the dofe\n* the gila\n\nThe dofe of the gila is closed.\n\n"


@pytest.fixture
def score(command: Command, finished: Finished) -> Any:
    """`score("letter.txt", "--out", ...)` with the tiny run; returns what the command left."""

    def run(*words: object, model: object = finished.folder) -> Outcome:
        return command("mlm.cli.score", *words, "--model", model)

    return run


@pytest.fixture
def letter(tmp_path: Path) -> Path:
    """A short letter in plain form."""
    path = tmp_path / "letter.txt"
    path.write_text(LETTER, encoding="utf-8")
    return path


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Let standard input be these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def bits_of(path: Path, column: str = "surprisal") -> np.ndarray:
    """A column of a file that was written."""
    return pq.read_table(path)[column].to_numpy()


# ---------------------------------------------------------------- what it says


def test_a_file_is_what_the_python_reader_makes_of_it(
    score: Any, letter: Path, tmp_path: Path, finished: Finished
) -> None:
    out = tmp_path / "words.parquet"
    outcome = score(letter, "--rules", "best", "rms", "--out", out, "--stats", "rank")
    assert outcome.code == 0, outcome.err
    assert outcome.err == "", "a progress bar where there is no terminal"
    model = mlm.load(finished.folder)
    table = model.reader("best", ("rms",), stats=("rank",)).score(LETTER)
    found = pq.read_table(out)
    assert found.column_names == table.column_names
    for name in table.column_names:
        if pa.types.is_floating(table.schema.field(name).type):
            assert found[name].to_numpy() == pytest.approx(table[name].to_numpy(), rel=1e-4)
        else:
            assert found[name].equals(table[name])
    words = len(LETTER.split()) + len(re.findall(r"\S\s*\n", LETTER))
    assert f"1 document, {words} words (line ends counted)" in outcome.out
    assert f"{letter}: form plain (guessed; --form sets it)" in outcome.out


def test_the_summary_is_of_the_rows(score: Any, letter: Path, tmp_path: Path) -> None:
    out = tmp_path / "words.parquet"
    text = score(letter, "--out", out).out
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    bits = bits_of(out, "surprisal_static_plain")
    # Canonical spelling: plain typography, one byte for the white space between two words.
    size = len(re.sub(r"\s+", " ", LETTER).encode())
    assert f"{size} bytes" in text
    assert float(rows["static"][2]) == pytest.approx(bits.sum() / size, abs=1e-3)
    gain = (bits - bits_of(out, "surprisal_plain")).mean()
    assert f"{gain:.3f}".replace("-", "−") in text


def test_standard_input_is_read_as_a_file_is(
    score: Any, letter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert score(letter, "--out", tmp_path / "file.parquet").code == 0
    for words in ((), ("-",)):
        stdin(monkeypatch, b"\xef\xbb\xbf" + LETTER.encode())
        outcome = score(*words, "--out", tmp_path / "piped.parquet")
        assert outcome.code == 0, outcome.err
        assert "standard input: form plain" in outcome.out
        assert pq.read_table(tmp_path / "piped.parquet").equals(
            pq.read_table(tmp_path / "file.parquet")
        )


@pytest.mark.parametrize("packing", ["xz", "gz", "zst"])
def test_packed_files_are_unpacked(score: Any, packing: str, tmp_path: Path) -> None:
    pack = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.compress}[packing]
    path = tmp_path / f"letter.txt.{packing}"
    path.write_bytes(pack(LETTER.encode()))
    outcome = score(path, "--rules", "static", "--out", tmp_path / "out.parquet")
    assert outcome.code == 0, outcome.err
    words = pq.read_table(tmp_path / "out.parquet")["word"].to_pylist()
    assert [w for w in words if w.strip()] == LETTER.split()


def test_markdown_is_known_by_its_name(score: Any, tmp_path: Path) -> None:
    path = tmp_path / "NOTES.md"
    path.write_text("The dofe.\n", encoding="utf-8")
    assert "form markdown (guessed" in score(path, "--rules", "static").out
    assert "form wrapped (as asked" in score(path, "--rules", "static", "--form", "wrapped").out


def test_parts_of_a_file_are_documents(score: Any, tmp_path: Path, finished: Finished) -> None:
    """Articles of a file, read side by side, alone, and by the chunk: the same losses."""
    text = (finished.corpus / "test.txt").read_text(encoding="utf-8")
    path = tmp_path / "test.txt"
    path.write_text(text, encoding="utf-8")
    flags = ("--split-on", "^ = [^=]")
    tables = {}
    for lanes in (1, 3):
        out = tmp_path / f"{lanes}.parquet"
        outcome = score(path, *flags, "--lanes", lanes, "--out", out)
        assert outcome.code == 0, outcome.err
        assert "4 documents, " in outcome.out
        tables[lanes] = pq.read_table(out)
    one, three = tables[1], tables[3]
    assert sorted(set(one["doc_id"].to_pylist())) == [0, 1, 2, 3]
    assert one["word"].to_pylist() == three["word"].to_pylist()
    assert [w for w in one["word"].to_pylist() if w.strip()] == text.split()
    assert one["doc_id"].equals(three["doc_id"])
    assert one["surprisal"].to_numpy() == pytest.approx(three["surprisal"].to_numpy(), abs=1e-3)
    openings = [row for row in one.to_pylist() if row["word"] == "=" and row["word_id"] < 3]
    assert len(openings) == 4, "each document begins with its title"


def test_long_documents_and_small_chunks_change_nothing(
    score: Any, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flags = finished.corpus / "test.txt", ("--split-on", "^ = [^=]")
    assert score(path, *flags, "--lanes", 1, "--out", tmp_path / "a.parquet").code == 0
    monkeypatch.setattr(inputs, "CHUNK", 700)
    assert score(path, *flags, "--lanes", 1, "--out", tmp_path / "b.parquet").code == 0
    assert pq.read_table(tmp_path / "b.parquet").equals(pq.read_table(tmp_path / "a.parquet"))
    monkeypatch.setattr(importlib.import_module("mlm.cli.score"), "BATCH", 1500)
    assert score(path, *flags, "--out", tmp_path / "c.parquet").code == 0
    mixed, alone = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ca")
    assert mixed["doc_id"].equals(alone["doc_id"])
    assert mixed["surprisal"].to_numpy() == pytest.approx(alone["surprisal"].to_numpy(), abs=1e-3)


def test_documents_are_read_side_by_side_as_far_as_memory_goes(
    score: Any, letter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (letter, letter, letter, "--rules", "three_levels", "rms", "--out")
    assert "side by side" not in score(*words, tmp_path / "many.parquet").err
    monkeypatch.setattr(reader_model, "free_bytes", lambda device: 1000.0)
    set_by_hand = score(*words, tmp_path / "asked.parquet", "--lanes", 3)
    assert "side by side" not in set_by_hand.err, "what the command line sets is not changed"
    done = score(*words, tmp_path / "few.parquet")
    assert done.code == 0
    assert "note: 1 documents side by side instead of 3" in done.err
    few, asked, many = (bits_of(tmp_path / f"{n}.parquet") for n in ("few", "asked", "many"))
    np.testing.assert_array_equal(asked, many)
    np.testing.assert_allclose(few, many, rtol=1e-5)


def test_in_protocol_stream_the_second_file_profits(
    score: Any, letter: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.txt"
    again.write_text(LETTER, encoding="utf-8")
    sums = {}
    for protocol in ("article", "stream"):
        out = tmp_path / f"{protocol}.parquet"
        assert score(letter, again, "--protocol", protocol, "--out", out).code == 0
        table = pq.read_table(out)
        second = table["doc_id"].to_numpy() == 1
        sums[protocol] = table["surprisal_plain"].to_numpy()[second].sum()
    assert sums["stream"] < sums["article"]


def test_a_memory_is_written_and_read_again(score: Any, letter: Path, tmp_path: Path) -> None:
    memory = tmp_path / "letter.memory"
    first, then, frozen = (tmp_path / f"{name}.parquet" for name in ("first", "then", "frozen"))
    assert score(letter, "--save-memory", memory, "--out", first).code == 0
    assert score(letter, "--memory", memory, "--out", then).code == 0
    outcome = score(letter, "--memory", memory, "--frozen", "--out", frozen)
    assert f"memory {memory}, frozen" in outcome.out
    column = "surprisal_plain"
    assert bits_of(then, column).sum() < bits_of(first, column).sum()
    assert bits_of(then, column)[0] == pytest.approx(bits_of(frozen, column)[0], rel=1e-4)
    assert bits_of(then, column).sum() != bits_of(frozen, column).sum()


def test_all_outputs_at_once(score: Any, letter: Path, tmp_path: Path) -> None:
    outcome = score(
        letter,
        *("--out", tmp_path / "words.tsv", "--units", "nats"),
        *("--nc", tmp_path / "nc.txt", "--page", tmp_path / "words.html"),
    )
    assert outcome.code == 0, outcome.err
    assert "nats gained per word" in outcome.out
    tsv = (tmp_path / "words.tsv").read_text(encoding="utf-8").splitlines()
    nc = (tmp_path / "nc.txt").read_text(encoding="utf-8").splitlines()
    assert len(tsv) == len(nc)
    assert nc[0] == "word sentid sentpos wlen surp entropy"
    columns = dict(zip(tsv[0].split("\t"), tsv[1].split("\t"), strict=True))
    assert columns["word"] == nc[1].split()[0] == "Dear"
    assert float(columns["surprisal"]) == pytest.approx(
        float(nc[1].split()[4]) * np.log(2), abs=1e-5
    )
    assert "letter.txt" in (tmp_path / "words.html").read_text(encoding="utf-8")


def test_unknown_words_are_counted_where_there_are_any() -> None:
    module = importlib.import_module("mlm.cli.score")
    model = SimpleNamespace(vocabulary=WordVocabulary(["<eos>", "<unk>", "the", ",", "dofe"]))
    reading = module.Reading(model, ["static"], module.Options(), [], {})
    reading._form = "plain"
    text = "the dofe, the gila\nthe <unk>"
    assert "".join(reading._counted(iter([text[:7], text[7:]]))) == text
    assert reading.unknown == 2, "gila and, in plain text, the sign <unk>"
    assert reading.size == len(text)


# ---------------------------------------------------------------- what it refuses

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no such file": (("nowhere.txt",), "no file nowhere.txt"),
    "a folder": (("folder",), "folder is a folder; name the text files in it"),
    "binary": (("binary.txt",), "binary.txt, line 2: a zero byte"),
    "Latin-1": (("latin.txt",), "latin.txt, line 2: not valid UTF-8 (byte 5: "),
    "cut short": (("cut.txt.xz",), "cut.txt.xz is damaged or cut short"),
    "no word": (("blank.txt",), "blank.txt has no word in it"),
    "the second is bad": (("letter.txt", "latin.txt"), "latin.txt, line 2: not valid UTF-8"),
    "a bad pattern": (("letter.txt", "--split-on", "("), "--split-on (: not a regular expression"),
    "twice standard input": (("-", "-"), "standard input (-) can be read only once"),
    "an unknown form of file": (("letter.txt", "--out", "words.csv"), "must end in .parquet or"),
    "over the input": (("words.tsv", "--out", "words.tsv"), "named twice; choose another name"),
    "two into one": (("letter.txt", "--out", "w.tsv", "--nc", "w.tsv"), "named twice"),
    "no such rule": (("letter.txt", "--rules", "fastest"), "no rule 'fastest'; choose from best, "),
    "no lane": (("letter.txt", "--lanes", "0"), "--lanes is 0; it must be at least 1"),
    "frozen at nothing": (("letter.txt", "--frozen"), "--frozen learns nothing, so it needs"),
    "two forms in a stream": (
        ("letter.txt", "notes.md", "--protocol", "stream"),
        "their forms are markdown, plain; name one with --form",
    ),
    "which memory": (
        ("letter.txt", "notes.md", "--save-memory", "m"),
        "--save-memory: several documents",
    ),
    "a page of static": (
        ("letter.txt", "--rules", "static", "--page", "p.html"),
        "--page compares",
    ),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: Path) -> Path:
    """A folder with a good text and several bad ones, entered."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "words.tsv").write_text(LETTER, encoding="utf-8")
    (tmp_path / "notes.md").write_text(NOTES, encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"PK\n\x00\x01\x02")
    (tmp_path / "latin.txt").write_bytes("Dofe,\nthe f\xe9 of Ku\n".encode("latin1"))
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(LETTER.encode())[:-20])
    (tmp_path / "blank.txt").write_bytes(b" \n\n\t\n")
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_the_model_is_loaded(
    case: str, place: Path, command: Command
) -> None:
    words, message = REFUSED[case]
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    outcome = command("mlm.cli.score", *words, "--model", "no/such/model")
    assert message in outcome.error
    assert outcome.code == 1
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before


def test_invalid_standard_input_names_line_and_byte(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, "Dofe,\nthe f\xe9 of Ku\n".encode("latin1"))
    error = command("mlm.cli.score", "--model", "no/such/model").error
    assert "standard input, line 2: not valid UTF-8 (byte 5: " in error


def test_an_unknown_rule_leaves_no_file(score: Any, letter: Path, tmp_path: Path) -> None:
    outcome = score(letter, "--rules", "fastest", "--out", tmp_path / "w.tsv")
    assert "'fastest'" in outcome.error
    swallowed = score("--rules", "best", letter).error  # before it waits for standard input
    assert f"no rule '{letter}'" in swallowed
    assert "Files to read come before --rules" in swallowed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt"]


def test_bad_usage_has_exit_code_2(score: Any, letter: Path) -> None:
    assert score(letter, "--protocol", "chapter").code == 2
    assert score(letter, "--no-such-flag").code == 2


def test_help_is_short(command: Command) -> None:
    text = command("mlm.cli.score", "--help").out
    assert "examples:" in text
    assert "--split-on" in text
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 100
