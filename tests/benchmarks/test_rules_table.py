"""The table of all ways to learn: its rows are ordinary runs, each measured once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command, Finished

import benchmarks.rules
from benchmarks.rules import ROWS, Bench, Options, Row, row_config
from mlm.base.errors import UserError
from mlm.base.names import HAND_MADE, LEARNED
from mlm.report.evaluation import read_evaluation
from mlm.store.run_folder import RunFolder

FEW = ("--budget", 1, "--steps", 1, "--words", 100, "--articles", 2, "--timing-tokens", 60,
       "--repetitions", 1, "--updates", 3, "--lanes", 2)  # fmt: skip


def test_every_rule_has_a_row_and_every_row_makes_sense(finished: Finished) -> None:
    shown = {rule for row in ROWS.values() for rule in row.rules}
    assert shown >= {*HAND_MADE, *LEARNED, "static+cache", "rms+cache", "three_levels+cache"}
    for row in ROWS.values():
        config = row_config(Options(finished.folder), finished.config, row, Path("row"))
        assert set(config.meta.rules) == {r for r in row.rules if r in LEARNED}


@pytest.mark.slow
def test_a_row_is_a_run_measured_once(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = finished.copy(tmp_path / "run"), tmp_path / "out"
    few = (folder, *FEW, "--out", out, "--rows", "tensor steps")
    assert command("benchmarks.rules", *few).code == 0
    made = json.loads((out / "rules.json").read_text(encoding="utf-8"))["rows"]
    assert [(r["row"], r["rule"]) for r in made][-1] == ("tensor steps", "tensor_steps")
    assert [r["rule"] for r in made[:-1]] == list(ROWS["hand-made"].rules)
    for row in made:
        rows = read_evaluation(folder / "rules" / row["folder"])
        for protocol in ("article", "stream"):
            total = next(
                r
                for r in rows
                if (r["kind"], r["rule"], r["protocol"]) == ("total", row["rule"], protocol)
            )
            assert total["nats_per_word_gained"] == pytest.approx(row[protocol], abs=1e-9)
        assert row["scoring tokens/s"] > 0
        assert (row["training tokens/s"] is not None) == (row["rule"] == "tensor_steps")
        if row["rule"] not in ("static+cache",):
            assert row["drift"] > 0
            assert row["late static"] > 0
    # a step and a decay for each of lstm.0.input, .recurrent, .bias, softmax.bias, and what the
    # start needs beside them: UPDATE's and FLUSH's constants and Fisher exponents
    assert made[-1]["parameters"] == 4 * 5
    assert {r["rule"]: r["parameters"] for r in made[:-1]}["rms+cache"] == 4

    def refused(*_, **__) -> None:
        raise UserError("measured again")

    monkeypatch.setattr(benchmarks.rules, "run_stages", refused)
    assert command("benchmarks.rules", *few).code == 0
    again = command("benchmarks.rules", *few, "--articles", 1)
    assert "measured again" in again.error, "other settings are another run"


@pytest.mark.slow
def test_gains_are_over_the_static_model_of_the_table(finished: Finished, tmp_path: Path) -> None:
    """Also those of a run with a language model of its own."""
    folder = finished.copy(tmp_path / "run")
    other = finished.copy(tmp_path / "other")
    options = Options(folder, budget=1, steps=1, words=100, articles=2, lanes=2)
    bench = Bench(options)
    bench.measure("hand-made", Row(("sgd",)))
    path = bench.measure("other", Row(("static", "sgd")), other)
    assert path == other / "rules" / "other"
    assert bench.gains(path, "static")["article"] == pytest.approx(0)
    evaluation = RunFolder(path).path / "evaluation.json"
    rows = json.loads(evaluation.read_text(encoding="utf-8"))
    for row in rows:
        if (row["kind"], row["rule"]) == ("article", "static"):
            row["nll"] -= 0.5 * row["words"]
    evaluation.write_text(json.dumps(rows), encoding="utf-8")
    assert bench.gains(path, "static")["stream"] == pytest.approx(0.5)


def test_bad_rows_are_refused(finished: Finished, command: Command, tmp_path: Path) -> None:
    done = command("benchmarks.rules", finished.folder, "--rows", "nothing", "--out", tmp_path)
    assert "--rows nothing: choose from hand-made" in done.error
    done = command("benchmarks.rules", tmp_path / "none", "--out", tmp_path)
    assert "is no run folder" in done.error
