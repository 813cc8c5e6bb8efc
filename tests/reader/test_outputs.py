"""Files of word losses: read back, escaped, in the other program's form, never half-written."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlm.base.errors import UserError
from mlm.reader import outputs
from mlm.reader.outputs import (
    check_output,
    in_nats,
    neural_complexity_file,
    page_file,
    table_file,
)

ROOT = Path(__file__).resolve().parents[2]
TOP = pa.list_(pa.struct([("piece", pa.string()), ("bits", pa.float64())]))


def rows_of(words: list[str], document: int = 0, sentences: list[int] | None = None) -> pa.Table:
    """A table as a reader gives it, with made-up losses."""
    number = len(words)
    bits = np.arange(number, dtype=np.float64) + 1.5
    return pa.table(
        {
            "doc_id": pa.array([document] * number, pa.int32()),
            "word_id": pa.array(range(number), pa.int32()),
            "sent_id": pa.array(sentences or [0] * number, pa.int32()),
            "word": pa.array(words, pa.string()),
            "surprisal": bits,
            "surprisal_plain": bits,
            "surprisal_static": bits + 1,
            "surprisal_static_plain": bits + 1,
            "entropy": bits / 2,
            "top_k": pa.array([[{"piece": '"a\t', "bits": 1.0}]] * number, TOP),
        }
    )


WORDS = ["a", 'say"', "back\\slash", "\n", "\r\n \n", "é"]


def test_a_parquet_file_is_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "ROW_GROUP", 4)
    tables = [rows_of(WORDS), rows_of(["b"], 1), rows_of(WORDS, 2)]
    with table_file(tmp_path / "t.parquet") as write:
        for table in tables:
            write(table)
    assert pq.read_table(tmp_path / "t.parquet").equals(pa.concat_tables(tables))
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 2


def test_a_tsv_file_has_one_line_a_word(tmp_path: Path) -> None:
    with table_file(tmp_path / "t.tsv") as write:
        write(rows_of(WORDS))
        write(rows_of(["b"], 1))
    with open(tmp_path / "t.tsv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    unescaped = [row["word"].encode().decode("unicode_escape") for row in found[:5]]
    assert unescaped == WORDS[:5]
    assert [row["doc_id"] for row in found] == ["0"] * 6 + ["1"]
    assert float(found[1]["surprisal"]) == 2.5
    piece = json.loads(found[0]["top_k"].replace("\\\\", "\\"))[0]
    assert piece == ['"a\t', 1.0]


def test_nats_are_bits_times_log_2(tmp_path: Path) -> None:
    table = in_nats(rows_of(WORDS))
    assert table["surprisal_static"].to_pylist() == pytest.approx(
        [b * math.log(2) for b in rows_of(WORDS)["surprisal_static"].to_pylist()]
    )
    assert table["entropy"][0].as_py() == pytest.approx(0.75 * math.log(2))
    assert table["top_k"][0].as_py() == [{"piece": '"a\t', "nats": pytest.approx(math.log(2))}]
    assert table["word_id"].to_pylist() == list(range(6))
    with table_file(tmp_path / "t.parquet", "nats") as write:
        write(rows_of(WORDS))
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_neural_complexity_form(tmp_path: Path) -> None:
    with neural_complexity_file(tmp_path / "nc.txt") as write:
        write(rows_of(["A", "b.", "\n"], 0, [0, 0, 0]))
        write(rows_of(["C", "d"], 1, [0, 1]))
    lines = (tmp_path / "nc.txt").read_text().splitlines()
    assert lines[0] == "word sentid sentpos wlen surp entropy"
    assert lines[1:] == [
        "A 0 0 1 1.5 0.75",
        "b. 0 1 2 2.5 1.25",
        "<eos> 0 2 5 3.5 1.75",
        "C 1 0 1 1.5 0.75",
        "d 2 0 1 2.5 1.25",
    ]
    with neural_complexity_file(tmp_path / "nc.tsv") as write:
        write(rows_of(["A"]))
    assert (tmp_path / "nc.tsv").read_text().splitlines()[1] == "A\t0\t0\t1\t1.5\t0.75"


def test_the_page_holds_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "WORD_LIMIT", 7)
    titles: dict[int, str] = {}
    with page_file(tmp_path / "p.html", "four_levels", "article", titles) as write:
        titles |= {0: "one.txt", 1: "two.txt"}
        write(rows_of(WORDS))
        write(rows_of(["quokka", "wombat"], 1))
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "quokka" in text
    assert "wombat" not in text
    assert "two.txt" in text
    assert "4 levels" in text


@pytest.mark.parametrize("name", ["t.parquet", "t.tsv", "nc.txt"])
def test_what_fails_leaves_no_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    make = neural_complexity_file if name == "nc.txt" else table_file

    def fail() -> None:
        with make(path) as write:
            write(rows_of(WORDS))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_names_that_say_nothing_of_the_form_are_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "t.tsv", (".parquet", ".tsv"), "--out")
    with pytest.raises(UserError, match=r"--out .*must end in \.parquet or \.tsv"):
        check_output(tmp_path / "t.csv", (".parquet", ".tsv"), "--out")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "folder.tsv", (".tsv",), "--out")


ANYWHERE = """
import sys
from pathlib import Path
import pyarrow as pa
from mlm.reader.outputs import table_file
from mlm.text.hub import ParquetDirectory
folder = Path(sys.argv[1])
folder.mkdir()
with table_file(folder / "train-1.parquet") as write:
    write(pa.table({"text": [" = A = ", "", " one two "]}))
print(next(ParquetDirectory(folder).articles("train")).text.split())
assert "torch" not in sys.modules
"""


def test_arrow_reads_and_writes_names_beyond_ascii_in_every_locale(tmp_path: Path) -> None:
    """In one whose file names are not UTF-8. It needs no torch."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = tmp_path / "anywhere.py"
    script.write_text(ANYWHERE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "größe"],
        env={**os.environ, **locale, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.split() == [b"['=',", b"'A',", b"'=',", b"'one',", b"'two']"]
