"""Rows, files and settings belong together: what is stale is dropped or refused, paths are not it.

Letters: M tokens per update.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Command, Finished
from tiny import as_flags, corpus_text, tiny_config, write_corpus

from mlm.reader import load
from mlm.reading import step
from mlm.report.evaluation import read_evaluation
from mlm.runs.identity import identity
from mlm.runs.rules import current_identity, tuned_settings
from mlm.runs.run import open_run
from mlm.store.run_folder import RunFolder

Contents = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).parents[2]
STATIC = ("--rules", "static", "--protocols", "article", "--no-draw")


def totals(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows of kind total, by split, protocol and rule."""
    rows = [row for row in read_evaluation(folder) if row["kind"] == "total"]
    return {(row["split"], row["protocol"], row["rule"]): row for row in rows}


def with_other_m(finished: Finished, command: Command, folder: Path) -> Path:
    """A run whose stage 2 was done again with M = 10 for one rule of two."""
    finished.copy(folder)
    words = ("--stages", "meta", "--update-every", 10, "--train-rules", "two_levels")
    outcome = command("train", "--out", folder, *words)
    assert outcome.code == 0, outcome.err
    assert re.search(
        "note: 3 levels: trained with other settings; .*metrics.jsonl are dropped", outcome.err
    )
    return folder


def test_every_row_says_what_it_was_made_with(finished: Finished) -> None:
    run = open_run(dataclasses.replace(finished.config, stages=("evaluate",)), quiet=True)
    rows = read_evaluation(finished.folder)
    for row in rows:
        assert row["identity"] == current_identity(run, row["rule"], row["protocol"])
        assert row["text"]
        if row["kind"] == "comparison":
            against = current_identity(run, row["against"], row["protocol"])
            assert row["identity_against"] == against
    of = {
        rule: {r["identity"] for r in rows if r["rule"] == rule}
        for rule in finished.config.evaluation.rules
    }
    assert sum(map(len, of.values())) == len(set().union(*of.values())), "no two rules alike"
    assert all(row["identity"] for row in RunFolder(finished.folder).rows())
    tuned = json.loads((finished.folder / "tuning.json").read_text(encoding="utf-8"))
    assert all(entry["identity"] for entry in tuned.values())


@pytest.mark.parametrize("name", ["REST", "LONGER", "GUARD"])
def test_a_guard_that_works_otherwise_makes_rows_stale_and_nothing_else(
    finished: Finished, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned settings and learned rules stay: the guard hardly decides which of them is best."""

    def now() -> tuple[str | None, dict[str, Any], str]:
        run = open_run(dataclasses.replace(finished.config, stages=("evaluate",)), quiet=True)
        return current_identity(run, "rms", "article"), tuned_settings(run), identity(run)

    row, *rest = now()
    monkeypatch.setattr(step, name, getattr(step, name) + 1)
    other, *same = now()
    assert None not in (row, other)
    assert other != row
    assert same == rest
    assert rest[0]


def test_a_rule_of_another_m_is_not_read_and_its_rows_go(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = with_other_m(finished, command, tmp_path / "run")
    rules = {row.get("rule") for row in RunFolder(folder).rows()}
    assert rules == {None, "two_levels"}
    error = command("evaluate", folder, "--no-draw").error
    assert "three_levels.safetensors was trained with another memory.safetensors" in error
    assert "--train-rules three_levels" in error
    assert "three_levels" not in load(folder).rules
    words = ("--rules", "static", "two_levels", "--protocols", "article", "--no-draw")
    outcome = command("evaluate", folder, *words)
    assert outcome.code == 0, outcome.err
    assert ": results with other settings, or of another rule or text, go: " in outcome.err
    assert "SGD dynamic evaluation (valid, article)" in outcome.err
    assert set(totals(folder)) == {("valid", "article", rule) for rule in ("static", "two_levels")}
    kinds = {(row["rule"], row.get("against")) for row in read_evaluation(folder)}
    assert kinds == {("static", None), ("two_levels", None)}
    columns = pq.read_schema(folder / "losses.parquet").names
    assert set(columns) - {"split", "article", "title", "position", "word"} == {
        "static",
        "two_levels",
    }


def test_rows_of_another_split_go_with_their_model(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    assert command("evaluate", folder, *STATIC, "--split", "test").code == 0
    assert ("test", "article", "static") in totals(folder)
    words = ("--stages", "meta", "--update-every", 10, "--train-rules", "two_levels")
    assert command("train", "--out", folder, *words).code == 0
    assert command("evaluate", folder, *STATIC).code == 0
    assert set(totals(folder)) == {("valid", "article", "static")}
    assert pq.read_table(folder / "losses.parquet")["split"].unique().to_pylist() == ["valid"]


def test_rows_of_other_articles_go(finished: Finished, command: Command, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "run")
    assert command("evaluate", folder, *STATIC, "--max-articles", 2).code == 0
    assert set(totals(folder)) == {("valid", "article", "static")}


# ---------------------------------------------------------------- paths are not it


def moved(finished: Finished, home: Path) -> tuple[Path, Path]:
    """A run and its corpus in another place; where they were there is nothing."""
    shutil.copytree(finished.corpus, home / "first" / "toy")
    config = tiny_config(home / "first" / "toy", home / "first" / "run")
    finished.copy(home / "first" / "run")
    RunFolder(home / "first" / "run").save_config(
        dataclasses.replace(config, resume=True), RunFolder(finished.folder).text
    )
    (home / "first").rename(home / "second")
    return home / "second" / "run", home / "second" / "toy"


@pytest.mark.slow
def test_a_run_and_its_text_may_move(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is the run's own wherever it lies; nothing is made again, and no row goes."""
    monkeypatch.chdir(tmp_path)
    folder, corpus = moved(finished, tmp_path)
    before = totals(folder)
    outcome = command("evaluate", folder, "--corpus", corpus, *STATIC)
    assert outcome.code == 0, outcome.err
    assert "is the run's own text; its split valid is scored" in outcome.err
    assert "go:" not in outcome.err
    assert "tuning" not in outcome.err
    assert set(totals(folder)) == set(before)
    assert not list(folder.glob("on-*"))
    words = ("--out", folder, "--corpus", corpus, "--stages", "meta", "evaluate", "--resume")
    checkpoint = RunFolder(folder).checkpoint("memory")
    made = checkpoint.stat().st_mtime_ns
    outcome = command("train", *words)
    assert outcome.code == 0, outcome.err
    assert checkpoint.stat().st_mtime_ns == made
    assert "go:" not in outcome.err
    assert RunFolder(folder).load_config().corpus == str(corpus)
    error = command("train", "--out", folder, "--corpus", tmp_path / "none", "--resume").error
    assert "no corpus" in error


def test_a_relative_path_is_found_from_elsewhere(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.corpus, tmp_path / "here" / "toy")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = tiny_config(Path("toy"), Path("run"), stages=("lm",), lm__epochs=0.2)
    assert command("train", *as_flags(config)).code == 0
    monkeypatch.chdir(tmp_path / "there")
    words = ("--out", "../here/run", "--resume")
    outcome = command("train", *words)
    assert outcome.code == 0, outcome.err


def test_another_text_is_not_taken_for_the_runs_own(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    """Nor is a changed one; validation text counts, for rules are tuned on it."""
    folder, corpus = moved(finished, tmp_path)
    (corpus / "valid.txt").write_text(corpus_text(4, 77), encoding="utf-8")
    before = contents(folder)
    for words in (("--stages", "meta"), ("--resume",)):
        error = command("train", "--out", folder, "--corpus", corpus, *words).error
        assert f"{folder} was trained with another text than {corpus} is now (valid)" in error
    assert contents(folder) == before
    other = write_corpus(tmp_path / "other", seed=5)
    assert command("evaluate", folder, "--corpus", other, *STATIC).code == 0
    assert len(list(folder.glob("on-other-*/evaluation.json"))) == 1


def test_a_single_file_is_scored_whole(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder, file = finished.copy(tmp_path / "run"), tmp_path / "story.txt"
    file.write_text(corpus_text(20, 3, sentences=3), encoding="utf-8")
    assert command("evaluate", folder, "--corpus", file, *STATIC).code == 0
    (results,) = folder.glob("on-story-*")
    assert totals(results)["whole", "article", "static"]["articles"] == 20


# ---------------------------------------------------------------- what config.json claims


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--seed", "1"), "--seed 0"), (("--lm.init", "elsewhere"), "--lm.init None")],
)
def test_resuming_with_other_settings_is_refused(
    words: tuple[str, ...],
    said: str,
    finished: Finished,
    command: Command,
    tmp_path: Path,
    contents: Contents,
) -> None:
    folder = finished.copy(tmp_path / "run")
    before = contents(folder)
    error = command("train", "--out", folder, "--resume", *words).error
    assert f"was made with {said}" in error
    assert contents(folder) == before


def test_later_stages_leave_what_made_the_first(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlm.store.run_folder.commit", lambda: "abc1234")
    monkeypatch.setattr("mlm.store.run_folder.dirty", lambda: True)
    folder = tmp_path / "run"
    config = tiny_config(finished.corpus, folder, stages=("lm",), lm__epochs=0.2)
    assert command("train", *as_flags(config)).code == 0
    monkeypatch.setattr("mlm.store.run_folder.commit", lambda: "fffffff")
    monkeypatch.setattr("mlm.store.run_folder.dirty", lambda: False)
    words = ("--stages", "meta", "--train-rules", "two_levels", "--meta-steps", 0, "--seed", 7)
    assert command("train", "--out", folder, *words).code == 0
    record = RunFolder(folder).load_record()
    first, last = record["history"]
    assert (first["stages"], first["commit"], first["dirty"]) == (["lm"], "abc1234", True)
    assert (first["seed"], RunFolder(folder).seed_of("lm")) == (0, 0)
    assert first["command"].endswith(" ".join(as_flags(config)))
    assert (last["stages"], last["commit"], last["dirty"]) == (["meta"], "fffffff", False)
    assert last["seed"] == 7
    assert (record["commit"], record["dirty"]) == ("fffffff", False)
    assert record["text"] == RunFolder(finished.folder).text


def test_stage_1_goes_on_with_its_own_seed(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a later stage was run with another meanwhile."""
    folder = finished.copy(tmp_path / "run")
    words = ("--stages", "meta", "--train-rules", "two_levels", "--meta-steps", 0, "--seed", 7)
    assert command("train", "--out", folder, *words).code == 0
    seen: list[int] = []
    monkeypatch.setattr(
        "mlm.stages.language_model.train_lm", lambda trainer, config, *_: seen.append(config.seed)
    )
    assert command("train", "--out", folder, "--stages", "lm", "--resume").code == 0
    assert seen == [0]


# ---------------------------------------------------------------- somebody else's folders


def test_a_cache_that_is_not_the_runs_own_is_not_written(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json may come from anywhere: only where its tokens lie already are others put."""
    monkeypatch.chdir(tmp_path)
    folder, precious = finished.copy(tmp_path / "run"), tmp_path / "precious"
    precious.mkdir()
    record = RunFolder(folder).load_record()
    record["config"]["text"]["data_dir"] = str(precious)
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    assert command("evaluate", folder, *STATIC).code == 0
    assert not list(precious.iterdir())
    assert list((tmp_path / "data" / "cache").rglob("*.tokens"))
    own = ("--text.data-dir", tmp_path / "own")
    assert command("evaluate", folder, *STATIC, *own).code == 0
    assert list((tmp_path / "own").rglob("*.tokens"))


def test_a_run_that_is_only_read_is_tuned_elsewhere(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    folder, results = finished.copy(tmp_path / "run"), tmp_path / "results"
    (folder / "tuning.json").unlink()
    before = contents(folder)
    words = ("--rules", "static", "sgd", "--protocols", "article", "--no-draw", "--out", results)
    for tuned in (True, False):
        outcome = command("evaluate", folder, *words)
        assert outcome.code == 0, outcome.err
        assert ("SGD dynamic evaluation, article: tuned on" in outcome.err) == tuned
    assert contents(folder) == before
    assert {path.name for path in results.iterdir()} >= {"tuning.json", "evaluation.json"}


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "POSIX"])
@pytest.mark.parametrize("utf8", ["0", "1"])
def test_paths_beyond_ascii_in_every_locale(
    locale: str, utf8: str, finished: Finished, tmp_path: Path
) -> None:
    """File names are bytes; whatever the locale, results are UTF-8."""
    corpus = Path(shutil.copytree(finished.corpus, tmp_path / "größe"))
    config = tiny_config(corpus, tmp_path / "läufe" / "один", lm__epochs=0.5, meta__steps=1)
    usual = {"LC_ALL": locale, "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "train.py", *as_flags(config)],
        cwd=ROOT,
        env={**os.environ, **usual},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    rows = read_evaluation(tmp_path / "läufe" / "один")
    assert {row["corpus"] for row in rows if row["kind"] == "total"} == {"größe"}
