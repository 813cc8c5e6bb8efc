"""What is said of the stages: their places, what they take, why one is skipped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import Command, Finished

from mlm.runs.run import Run, open_run
from mlm.stages.fit import Takes
from mlm.stages.plan import TITLES, Done, StagePlan, done_before
from mlm.store.run_folder import RunFolder

TAKES = {"lm": Takes(1e9, 60.0), "meta": Takes(2e9, 120.0), "draw": Takes(0.0, 14.0)}


def test_every_stage_has_its_place_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    done = {"lm": Done(0.5, "goes on at step 5 of 10"), "meta": Done(1.0)}
    plan = StagePlan([*TITLES], ("lm", "meta", "draw"), TAKES, done=done)
    plan.announce(Path("runs/mine"))
    assert plan.begin("lm")
    assert plan.begin("meta")
    assert not plan.begin("evaluate")
    assert plan.begin("draw")
    assert capsys.readouterr().err.splitlines() == [
        "runs/mine: 2 stages, about 44 s, up to 1.0 GB of memory",
        "[1/4] language model: about 30 s, up to 1.0 GB; goes on at step 5 of 10",
        "[2/4] meta-learner: done before",
        "[3/4] evaluation: skipped (not in --stages)",
        "[4/4] pictures: about 14 s",
    ]


def test_one_stage_has_one_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    plan = StagePlan(("evaluate", "draw"), ("draw",), TAKES, "--no-draw")
    plan.announce(Path("runs/mine"))
    plan.begin("draw")
    assert capsys.readouterr().err == "[2/2] pictures: about 14 s\n"


def _again(finished: Finished) -> Run:
    config = RunFolder(finished.folder).load_config()
    config = dataclasses.replace(config, resume=True, out=finished.folder)
    return open_run(config, quiet=True)


def test_a_finished_run_is_done_before(finished: Finished) -> None:
    run = _again(finished)
    assert {name: done.share for name, done in done_before(run).items()} == {"lm": 1, "meta": 1}
    assert done_before(run.with_config(dataclasses.replace(run.config, resume=False))) == {}


def test_a_damaged_checkpoint_is_left_to_the_stage(finished: Finished, tmp_path: Path) -> None:
    run = _again(finished._replace(folder=finished.copy(tmp_path / "run")))
    run.folder.checkpoint("lm_last").write_bytes(b"nothing")
    assert done_before(run) == {"lm": Done()}


@pytest.mark.slow  # every picture is drawn
def test_commands_end_with_page_tables_and_figures(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    done = command("evaluate", folder)
    assert done.code == 0, done.err
    *table, page, tables, figures = done.out.splitlines()
    assert page == f"page    {folder / 'words.html'}"
    assert tables == f"tables  {folder / 'evaluation.md'}"
    assert figures == f"figures {folder / 'figures'}"
    assert not [line for line in table if "\x1b" in line]
    said = [line for line in done.err.splitlines() if line.startswith("[")]
    assert [line.partition(":")[0] for line in said] == ["[1/2] evaluation", "[2/2] pictures"]
    done = command("train", "--out", folder, "--stages", "draw")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [page, tables, figures]
    assert "[1/4] language model: skipped (not in --stages)" in done.err.splitlines()
    assert len(set(filter(None, done.err.splitlines()))) == len(done.err.split("\n")) - 2
