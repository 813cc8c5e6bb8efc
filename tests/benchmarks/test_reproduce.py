"""One command per table: what is asked for is made once, and what is missing is told first."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
from conftest import Command

from benchmarks import reproduce
from benchmarks.reproduce import TABLES, Options, Table, chosen, command, made

TOY = {
    "first": Table("a", "timeit -n 1 -r 1 pass", "results/a", 1, 1, needs=("stories",)),
    "second": Table("b", "timeit -n 1 -r 1 pass", "results/b", 2, 1, after=("first",)),
    "broken": Table("c", "timeit -n none {to}", "results/c", 3),
    "apart": Table("d", "timeit -n 1 -r 1 pass", "results/d", apart="trains rules"),
}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Options:
    """Tables that take no time, and a file that one of them needs."""
    monkeypatch.setattr(reproduce, "TABLES", TOY)
    (tmp_path / "times.tsv").write_text("word\n", encoding="utf-8")
    return Options(stories=str(tmp_path / "times.tsv"), out=tmp_path / "out")


def flags(options: Options) -> tuple[object, ...]:
    return ("--stories", options.stories, "--out", options.out)


def test_a_table_is_made_once(toy: Options, command: Command) -> None:
    done = command("benchmarks.reproduce", "second", *flags(toy))
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if line.startswith("first: ")]
    assert "minutes: 1, GB at most: 1" in said[0], "what it costs is said before it starts"
    assert made("first", toy)
    assert made("second", toy)
    done = command("benchmarks.reproduce", "second", *flags(toy))
    assert "second: is there" in done.err
    assert "python -m timeit" not in done.err
    assert (
        "python -m timeit" in command("benchmarks.reproduce", "second", "--again", *flags(toy)).err
    )
    assert not made("second", dataclasses.replace(toy, out=toy.out / "else"))
    done = command("benchmarks.reproduce", *flags(toy))
    assert done.code == 0
    assert "| `second` | b |  | 2 | 1 | `results/b` | yes |" in done.out
    assert "| `apart` | d | trains rules | not measured | not measured |" in done.out


def test_another_model_makes_its_own_tables(toy: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce.make("first", toy)
    assert made("first", toy)
    folder = toy.out / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(reproduce, "find_model", lambda name: folder)
    assert not made("first", toy)


def test_a_failure_is_told_and_is_no_table(toy: Options, command: Command) -> None:
    done = command("benchmarks.reproduce", "broken", *flags(toy))
    assert "broken: its command failed with exit code" in done.error
    assert not made("broken", toy)


def test_what_is_missing_is_told_before_anything_is_made(toy: Options, command: Command) -> None:
    done = command("benchmarks.reproduce", "second", "--stories", "none.tsv", "--out", toy.out)
    assert "--stories: no file none.tsv" in done.error
    assert "or leave out what needs it: first" in done.error
    assert not toy.out.exists()
    assert "no table 'third'; choose from first" in command("benchmarks.reproduce", "third").error


def test_all_leaves_out_what_trains(toy: Options) -> None:
    assert chosen(["all"], toy) == ["first", "second", "broken"]
    assert chosen(["apart", "second"], toy) == ["first", "second", "apart"]


@pytest.mark.parametrize("name", TABLES)
def test_commands_are_there(name: str) -> None:
    """Modules, and options that exist; every table has a page."""
    table, words = TABLES[name], command(name, Options())
    assert set(table.needs) <= {field.name for field in dataclasses.fields(Options)}
    assert set(table.after) <= set(TABLES)
    root = Path(__file__).resolve().parents[2]
    module = root / f"{words[0].replace('.', '/')}.py"
    assert module.exists() or (module.with_suffix("") / "__main__.py").exists()
    made = importlib.import_module(words[0]) if module.exists() else None
    options = getattr(made, "Options", None)
    known = {field.name for field in dataclasses.fields(options)} if options else set()
    asked = {word[2:].replace("-", "_").removeprefix("no_") for word in words if word[:2] == "--"}
    assert not options or asked <= known
    assert (root / table.page / "README.md").exists()


def test_the_whole_evidence_takes_less_than_an_hour() -> None:
    assert sum(table.minutes or 60 for table in TABLES.values() if not table.apart) < 60
