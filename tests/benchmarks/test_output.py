"""Benchmarks write to a folder of the user's; only `publish` writes to results/, and no text."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Command, Finished

import benchmarks
from benchmarks.output import HOME
from benchmarks.timing import SIZES
from mlm.models.recurrent import RecurrentLM

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
#: The benchmarks that write nothing of their own accord: they ask for a folder.
ASKING = {"publish": "to", "unread": "out", "unpack": "folder"}
TINY = RecurrentLM(vocabulary=11, embedding=8, hidden=8, layers=1)


def _settings(name: str) -> dict[str, dataclasses.Field]:
    """The settings of a benchmark; none of a module that is no command."""
    module = importlib.import_module(f"benchmarks.{name}")
    options = getattr(module, "Options", None)
    if options is None or not hasattr(module, "main"):
        return {}
    return {field.name: field for field in dataclasses.fields(options)}


@pytest.mark.parametrize("name", MODULES)
def test_no_default_leads_into_results(name: str) -> None:
    settings = _settings(name)
    for field in settings.values():
        if isinstance(field.default, Path):
            assert "results" not in field.default.parts, f"{name}: {field.name}"
    if name in ASKING:
        assert settings[ASKING[name]].default is dataclasses.MISSING
    elif settings:
        assert settings["out"].default == HOME / name


def test_benchmarks_are_found() -> None:
    assert {name for name in MODULES if _settings(name)} >= {"peers", "claim", "rules", *ASKING}


@pytest.mark.filterwarnings("default")  # other libraries may warn
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("peers", "--rounds 1 --lanes 2 --segment 5 --unroll 2 --updates 1 --device cpu"),
        ("busy", "--rounds 1 --lanes 2 --segment 5 --updates 1"),
    ],
)
def test_a_benchmark_leaves_the_repository_as_it_was(
    name: str, flags: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the repository: no tracked file changes, and what is new is ignored."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", "results")
    shutil.copyfile(ROOT / ".gitignore", ".gitignore")

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], check=True, capture_output=True, text=True)
        return done.stdout

    git("init", "--quiet")
    git("add", "--all")
    monkeypatch.setitem(SIZES, "S", TINY)
    done = command(f"benchmarks.{name}", *flags.split())
    assert done.code == 0, done.err
    assert not git("diff", "--name-only")
    assert not git("ls-files", "--others", "--exclude-standard")
    assert (HOME / name / f"{name}_S.json").is_file()


def test_what_a_benchmark_wrote_is_published(command: Command, tmp_path: Path) -> None:
    source, to = tmp_path / "claim", tmp_path / "results"
    shown = ("claims.json", "growth.png", "wiki/positions.json", "wiki/figures/figure2.svg")
    kept = ("weights.safetensors", "wiki/losses.parquet", "wiki/figures/words.png", "words.html",
            "made.json", "wiki/made.json")  # fmt: skip
    for file in (*shown, *kept):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_text(file, encoding="utf-8")
    (to / "claims.json").parent.mkdir()
    (to / "claims.json").write_text("old", encoding="utf-8")
    done = command("benchmarks.publish", source, to)
    assert done.code == 0, done.err
    found = {str(p.relative_to(to)): p.read_text("utf-8") for p in to.rglob("*") if p.is_file()}
    assert found == {file: file for file in shown}


def test_a_run_is_published_without_text_and_weights(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    done = command("benchmarks.publish", finished.folder, tmp_path)
    assert done.code == 0, done.err
    found = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {Path("evaluation.json"), Path("config.json"), Path("figures/figure2.png")} <= found
    assert {path.suffix for path in found} <= {
        ".json",
        ".jsonl",
        ".md",
        ".png",
        ".svg",
        ".pdf",
        ".csv",
    }
    assert not [path for path in found if "words" in path.name]


def test_what_cannot_be_published_is_told(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    assert "neither a run" in command("benchmarks.publish", tmp_path / "none", tmp_path).error
    runs = tmp_path / "runs"
    shutil.copytree(finished.folder, runs / "one")
    assert "publish one of them" in command("benchmarks.publish", runs, tmp_path / "to").error
    (runs / "one" / "evaluation.json").unlink()
    done = command("benchmarks.publish", runs / "one", tmp_path / "to")
    assert "run evaluate.py on it first" in done.error
    assert not (tmp_path / "to").exists()
