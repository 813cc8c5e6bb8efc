"""Gains on names and on other words, from word losses made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from benchmarks.names import groups, kinds_of, names_of, rows_of, shown_rules, word_counts
from benchmarks.readme import engine
from mlm.base.errors import UserError
from mlm.report.losses import LossTable, write_losses

TEXTS = (
    "<eos> = Vera Holt = <eos> <eos> Vera Holt sold lamps in Delft . Lamps were dear . Delft and "
    "the Stone Bridge , 3 @.@ 5 miles long , and a stone . Holt died , and <unk> too . <eos>",
    "<eos> = Ore = <eos> <eos> The man from Delft met May in may . <eos>",
)
COUNTS = {"lamps": 50, "Lamps": 5, "Delft": 9, "delft": 0, "may": 90, "May": 80, "bridge": 40}
COUNTS |= {"Bridge": 30, "man": 99, "The": 70, "the": 900}


def _table() -> LossTable:
    """Static losses of 4 nats, of which rule rms saves 2 at names read before, 1 elsewhere."""
    words = [text.split() for text in TEXTS]
    flat = [word for text in words for word in text]
    static = np.full(len(flat), 4.0, np.float32)
    rms = static - 1
    seen: set[tuple[int, str]] = set()
    at = 0
    for a, text in enumerate(words):
        for word in text:
            rms[at] -= (a, word) in seen and word in ("Vera", "Holt", "Delft")
            seen.add((a, word))
            at += 1
    return LossTable(
        split="valid",
        article_N=np.repeat([0, 1], [len(text) for text in words]).astype(np.int32),
        position_N=np.concatenate([np.arange(len(text)) for text in words]).astype(np.int32),
        word_N=np.array(flat, dtype=object),
        titles={0: "Vera Holt", 1: "Ore"},
        losses={"static": static, "rms": rms, "rms+kneser_ney": rms, "static+kneser_ney": static},
    )


def test_names_are_told_by_their_capital() -> None:
    first, second = (text.split() for text in TEXTS)
    assert names_of(first, COUNTS) == {"Holt", "Delft"}  # Vera: only at the start of lines
    assert names_of(second, COUNTS) == {"Delft"}, "May stands there in lower case"
    assert "Bridge" not in names_of(first, COUNTS), "the training text has it in lower case"
    assert "Bridge" in names_of(first, {})
    assert names_of(["He", "met", "I", "and", "A", "."], {}) == set()


def test_every_word_has_a_kind() -> None:
    table = _table()
    kinds = dict(zip(table.word_N.tolist(), kinds_of(table, COUNTS).tolist(), strict=True))
    assert kinds["Delft"] == "names"
    assert kinds["lamps"] == kinds["the"] == "other words"
    assert kinds["3"] == kinds["5"] == "numbers"
    assert kinds["<eos>"] == kinds["@.@"] == kinds["="] == "marks"
    assert kinds["<unk>"] == "<unk>"


def test_shares_add_up_and_gains_are_those_of_the_words() -> None:
    table = _table()
    rows = rows_of(table, COUNTS, "article", ["rms"], resamples=49)
    found = {(row["words"], row["by"], row["which"]): row for row in rows}
    kinds = [row for row in rows if row["words"] != "all" and not row["by"]]
    for name in ("rms: share", "share of words"):
        assert sum(row[name] for row in kinds) == pytest.approx(1)
    for by in ("mention", "times in training"):  # a partition; a first mention has no distance
        parts = [row for row in rows if row["words"] == "names" and row["by"] == by]
        assert sum(r["rms: share"] for r in parts) == pytest.approx(
            found["names", "", ""]["rms: share"]
        )
    assert found["names", "mention", "1"]["rms"] == pytest.approx(1)
    assert found["names", "mention", "2"]["rms"] == pytest.approx(2)
    assert found["names", "distance", "1 to 50"]["rms"] == pytest.approx(2)
    assert found["all", "", ""]["static"] == pytest.approx(4)
    sizes = {tuple(name.values()): int(inside.sum()) for name, inside in groups(table, COUNTS)}
    assert sizes["names", "times in training", "1 to 9"] == 3  # Delft
    assert sizes["names", "times in training", "0"] == 3  # Holt


def test_rules_that_are_shown() -> None:
    table = _table()
    assert set(shown_rules(table, "article")) == {"rms", "static+kneser_ney"}
    assert shown_rules(table, "article", ["rms"]) == ["rms"]
    with pytest.raises(UserError, match="choose some of them with --rules"):
        shown_rules(table, "article", ["lstm"])
    with pytest.raises(UserError, match="protocol stream, has no rules"):
        shown_rules(table, "stream")


def test_table_and_figure_are_made_from_a_folder(tmp_path: Path, command: Command) -> None:
    write_losses(tmp_path / "run" / "losses.parquet", _table())
    text = " \\n = One = \\n \\n The lamps of Delft . \\n".replace("\\n", "\n")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text(text, encoding="utf-8")
    assert word_counts(str(tmp_path / "text"))["Delft"] == 1
    out = tmp_path / "out"
    done = command(
        "benchmarks.names", tmp_path / "run", "--corpus", tmp_path / "text", "--out", out
    )
    assert done.code == 0, done.err
    assert {p.name for p in out.iterdir()} == {f"names.{e}" for e in ("json", "png", "svg", "csv")}
    found = json.loads((out / "names.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in (out / "names.json").read_text(encoding="utf-8")
    assert found["titles"]["static+kneser_ney"] == "static + Kneser-Ney"
    assert "| names | mention | 2 |" in "\n".join(engine(str(out / "names.json")))
    assert "Holt" not in (out / "names.json").read_text(encoding="utf-8")
    done = command("benchmarks.names", tmp_path, "--corpus", tmp_path / "text")
    assert "losses.parquet not found" in done.error
