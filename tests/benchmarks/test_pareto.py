"""The benchmark of gain against cost: what it measures, keeps and draws."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import Command, Finished

from benchmarks.pareto import Bench, Choice, Options, choices
from benchmarks.pareto_picture import label, pareto_front
from mlm.base.errors import UserError
from mlm.reading.scoring import score_articles

FEW = ("--budget", 1, "--steps", 1, "--words", 100, "--timing-tokens", 200, "--repetitions", 1)


def test_front_holds_what_nothing_beats_in_both() -> None:
    points = [(2.0, 0.3), (1.0, 0.1), (1.5, 0.05), (2.0, 0.2), (3.0, 0.4), (4.0, 0.4)]
    assert pareto_front(points) == [1, 0, 4]
    assert pareto_front([]) == []


def test_choices_are_every_set_at_every_segment() -> None:
    sets = ("softmax.bias", "softmax.low@8", "low", "lstm.last.*")
    options = Options(Path("run"), sets=sets, segment=(20, 64))
    found = choices(options, layers=1, rank=32)
    assert found == [
        Choice("softmax.bias", 0, 20),
        Choice("softmax.bias", 0, 64),
        Choice("softmax.low", 8, 20),
        Choice("softmax.low", 8, 64),
        Choice("low", 32, 20),
        Choice("low", 32, 64),
    ]
    assert choices(options, layers=3, rank=32)[-1] == Choice("lstm.2.*", 0, 64)
    assert label({"dynamic": "lstm,softmax.low", "rank": 8}) == "lstm + softmax.low r8"
    for word in ("softmax.low@0", "softmax.low@x", "lstm@8", "softmax.low@"):
        with pytest.raises(UserError, match="@ is for a rank"):
            choices(Options(Path("run"), sets=(word,)), layers=1, rank=32)


def test_text_and_static_loss(finished: Finished) -> None:
    """Gains are over the static loss of the whole text; times are of equal parts in all lanes."""
    bench = Bench(Options(finished.folder, words=100, timing_tokens=60))
    assert [len(article) for article in bench.timing_text] == [20, 20, 20]
    text = bench.run.tune_text
    plain = score_articles(bench.run.base, None, text.articles, text.eos, 1)
    assert bench.static_nats == pytest.approx(plain.total, rel=1e-5)
    assert bench.gain(bench.static_nats - 3 * bench.words) == pytest.approx(3)
    assert bench.gain(float("inf")) is None


@pytest.mark.slow
def test_rows_are_measured_once(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "engine"
    measured = []
    original = Bench.measure

    def measure(self: Bench, choice: Choice):
        measured.append(choice.dynamic)
        if choice.dynamic == "softmax.*":
            raise UserError("it diverged")
        return original(self, choice)

    monkeypatch.setattr(Bench, "measure", measure)
    base = ("benchmarks.pareto", finished.folder, "--out", out, "--segment", 20, *FEW)
    first = command(*base, "--sets", "softmax.bias")
    assert first.code == 0, first.err
    second = command(*base, "--sets", "softmax.bias", "softmax.*", "softmax.low,softmax.bias@4")
    assert second.code == 0, second.err
    assert "left out: it diverged" in second.err
    assert measured == ["softmax.bias", "softmax.*", "softmax.low,softmax.bias"]
    rows = json.loads((out / "pareto.json").read_text(encoding="utf-8"))["rows"]
    assert [(r["dynamic"], r["rank"]) for r in rows] == [
        ("softmax.bias", 0),
        ("softmax.low,softmax.bias", 4),
    ]
    size = finished.config.text.vocabulary_size
    assert [r["bytes per lane"] for r in rows] == [4 * size, 4 * (size + 4 * size)]
    assert all(r["time over static"] > 0 for r in rows)
    with open(out / "pareto.csv", encoding="utf-8") as file:
        drawn = list(csv.DictReader(file))
    assert [row["dynamic"] for row in drawn] == [row["dynamic"] for row in rows]
    assert [float(d["learned"]) for d in drawn] == pytest.approx(
        [r["learned"] for r in rows], rel=1e-4
    )
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "softmax.low + softmax.bias r4" in (out / "pareto.svg").read_text(encoding="utf-8")
    # Times can be measured again without training again.
    again = command(*base, "--sets", "softmax.bias", "--time-again")
    assert (again.code, len(measured)) == (0, 3)
    renewed = json.loads((out / "pareto.json").read_text(encoding="utf-8"))["rows"]
    assert renewed[0]["time over static"] != rows[0]["time over static"]
    assert [r["learned"] for r in renewed] == [r["learned"] for r in rows]
    # Other settings are other rows, and the old ones stay.
    assert command(*base, "--sets", "softmax.bias", "--words", 150).code == 0
    assert len(measured) == 4
    assert len(json.loads((out / "pareto.json").read_text(encoding="utf-8"))["rows"]) == 3
    # Rows of before there was a choice are those of 3 levels; another rule's is a row of its own.
    old = json.loads((out / "pareto.json").read_text(encoding="utf-8"))
    for row in old["rows"]:
        assert row.pop("rule") == "three_levels"
    (out / "pareto.json").write_text(json.dumps(old), encoding="utf-8")
    assert command(*base, "--sets", "softmax.bias").code == 0
    assert len(measured) == 4
    slow = command(*base, "--sets", "softmax.bias", "--rule", "four_levels", "--unroll", 2)
    assert (slow.code, len(measured)) == (0, 5), slow.err
    rows = json.loads((out / "pareto.json").read_text(encoding="utf-8"))["rows"]
    assert [r["rule"] for r in rows] == ["three_levels"] * 3 + ["four_levels"]


def test_a_damaged_table_is_named(finished: Finished, command: Command, tmp_path: Path) -> None:
    (tmp_path / "pareto.json").write_text("{", encoding="utf-8")
    words = ("benchmarks.pareto", finished.folder, "--out", tmp_path, "--sets", "softmax.bias")
    assert "pareto.json is damaged" in command(*words).error
