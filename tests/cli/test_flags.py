"""Flags: their help, their earlier names, and the same name for the same thing in every script."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command, Finished
from tiny import as_flags

from mlm.cli.flags import parse, settings_of, today
from mlm.cli.train import HELP
from mlm.settings.config import Config
from mlm.settings.flags import GROUPS, SHORT, aliases, flag, leaves, replaced
from mlm.settings.presets import PRESETS, settings, with_rule
from mlm.store.run_folder import RunFolder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The settings with which stages would have begun."""
    found: list[Config] = []
    monkeypatch.setattr("mlm.stages.order.run_stages", found.append)
    return found


def test_help_fits_two_screens(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = command("train", "--help")
    lines = shown.out.splitlines()
    assert shown.code == 0
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100
    assert 25 <= len(set(SHORT.values()) & {word for line in lines for word in line.split()}) <= 35
    assert [line for line in lines if line.startswith("examples")]
    assert "--meta.unroll" not in shown.out


def test_all_help_explains_every_setting(command: Command) -> None:
    shown = command("train", "--help-all").out
    for setting in settings_of(Config()):
        name = flag(setting.path)
        if setting.value is True:
            name = f"--no-{name[2:]}"
        assert f"  {name}" in shown
        assert setting.help, setting.path


def test_help_shows_the_defaults_of_the_size_named(command: Command) -> None:
    shown = command("train", "--size", "small", "--help").out
    assert "[256]" in shown
    assert "--size small" in shown


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_examples_of_help_can_be_read(script: str, command: Command) -> None:
    assert (
        f"{script}.py --" in command(script, "--help").out or "RUN" in command(script, "--help").out
    )
    for line in HELP.splitlines():
        words = [w for w in line.partition("#")[0].split() if w.startswith("--")]
        assert set(words) <= {"--size", "--rule", *SHORT.values()}, line


def test_groups_name_settings_that_exist() -> None:
    paths = {*leaves(Config()), "draw"}
    for group in GROUPS.values():
        assert set(group.values()) <= paths
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))


def test_earlier_names_still_work(command: Command, seen: list[Config], tmp_path: Path) -> None:
    for old, new in aliases().items():
        assert new in SHORT.values(), old
    words = ("--adapt.segment", 30, "--lm.epochs=2.5", "--evaluation.rules", "static", "rms")
    done = command("train", "--out", tmp_path, *words, "--evaluation.split", "test")
    assert done.code == 0, done.err
    found = seen[0]
    assert (found.adapt.update_every, found.lm.epochs) == (30, 2.5)
    assert found.evaluation.rules == ("static", "rms")
    assert found.evaluation.split == "test"
    gone = command("train", "--adapt.threads", 2).error
    assert "use --threads, which counts for every stage" in gone


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_size_and_a_rule(name: str, command: Command, seen: list[Config]) -> None:
    assert command("train", "--preset", name).code == 0
    size, rule = PRESETS[name]
    assert command("train", "--size", size, "--rule", rule).code == 0
    assert seen[0] == seen[1] == settings(size, rule)
    for more in (("--size", "tiny"), ("--rule", "best")):
        error = command("train", "--preset", name, *more).error
        assert "--preset names a size and a rule" in error


def test_unknown_size_and_rule(command: Command) -> None:
    assert (
        "--size huge: unknown; choose from tiny, small" in command("train", "--size", "huge").error
    )
    assert "--rule worst: unknown; choose from" in command("train", "--rule", "worst").error


def test_a_later_stage_takes_a_rule_but_no_other_model(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    words = ("--out", folder, "--stages", "meta")
    error = command("train", *words, "--size", "small", "--hidden", 99).error
    assert "was made with --size tiny, --hidden 16" in error
    error = command("train", *words, "--preset", "best").error
    assert "was made with --size tiny" in error
    config = RunFolder(folder).load_config()
    assert with_rule(config, "best").model == config.model
    assert with_rule(config, "best").adapt == settings("tiny", "best").adapt


def test_resume_refuses_other_settings_by_name(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    words = ("--out", folder, "--resume", "--stages", "meta")
    for more, named in (
        (("--rule", "best"), "--rule default"),
        (("--size", "small"), "--size tiny"),
        (("--preset", "awd"), "--size tiny"),
        (("--update-every", "30", "--seed", "4"), "--seed 0, --update-every 20"),
    ):
        error = command("train", *words, *more).error
        assert f"was made with {named}" in error
    same = as_flags(replaced(finished.config, {"out": folder, "stages": ("meta",)}))
    assert command("train", *same, "--resume", "--size", "tiny").code == 0


def test_the_same_thing_has_the_same_flag_in_every_script(
    finished: Finished, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What scoring shares with training: one flag, and the same default as the run's."""
    found = []
    monkeypatch.setattr("mlm.stages.evaluate.evaluate_run", lambda *args: found.append(args))
    words = ("--split", "test", "--rules", "static", "--protocols", "stream", "--threads", 2)
    assert command("evaluate", finished.folder, *words, "--max-articles", 1).code == 0
    config, corpus, draw, results = found[0]
    assert (config.threads, corpus, draw, results) == (2, None, True, None)
    assert config.evaluation.split == "test"
    assert config.evaluation.rules == ("static",)
    assert config.evaluation.protocols == ("stream",)
    assert config.evaluation.budget == finished.config.evaluation.budget
    assert "--split" in command("visualize", "--help").out
    error = command("evaluate", finished.folder, "--tune-words", 5).error
    assert "--tune-words is called --evaluation.tune-words" in error


def test_threads_are_one_setting() -> None:
    """0: PyTorch's choice, and from stage 2 on one for small models; else what is asked for."""
    from mlm.runs.run import threads_of

    tiny, small = settings("tiny"), settings("small")
    assert [threads_of(tiny, first) for first in (True, False)] == [0, 1]
    assert [threads_of(small, first) for first in (True, False)] == [0, 0]
    asked = replaced(tiny, {"threads": 3})
    assert [threads_of(asked, first) for first in (True, False)] == [3, 3]


@pytest.mark.parametrize("words", [("--no-meta.per-tensor",), ("--meta.no-per-tensor",)])
def test_switches_are_turned_off_by_no(words: tuple[str, ...]) -> None:
    """Before the name, as help says; before its last part, too."""
    assert not parse("x", today(words), settings_of(Config()))["meta.per_tensor"]
    assert parse("x", today(["--boundaries.on"]), settings_of(Config()))["extensions.boundaries.on"]
