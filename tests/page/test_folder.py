"""Everything that a folder with results shows: the pictures, and the page beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Command
from fake_run import make_run

from mlm.cli.show import Options
from mlm.page.folder import draw_run
from mlm.page.page import WORD_LIMIT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose pictures take no time."""
    monkeypatch.setattr("mlm.report.plots.PICTURES", ())
    rules, protocols = ("static", "rms"), ("article",)
    return make_run(
        tmp_path / "run",
        lengths=(60, 50),
        splits=("valid", "test"),
        rules=rules,
        protocols=protocols,
        resamples=9,
    )


def test_the_page_of_each_split_has_a_name_of_its_own(run: Path):
    assert draw_run(run) == [run / "words.html"]
    assert draw_run(run, "test") == [run / "words_test.html"]


def test_the_page_holds_as_many_words_as_asked_for(run: Path):
    (page,) = draw_run(run, page_words=70)
    text = page.read_text(encoding="utf-8")
    assert '"all_words": 110' in text
    assert '"of": 50' in text
    assert '"words": 10}' in text
    assert Options(run).page_words == WORD_LIMIT
    assert WORD_LIMIT >= 245_569  # WikiText-103's test split


def test_the_command_shows_a_passage_in_the_terminal(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = command("visualize", run, "--terminal", "--passage", 2, 4)
    assert shown.code == 0, shown.err
    assert "2. Title 1, from word 4: RMS dynamic evaluation against static" in shown.out
    assert "\x1b[" not in shown.out  # not a terminal
    assert not (run / "words.html").exists()
    pair = ("--rule", "static", "--against", "rms")
    turned = command("visualize", run, "--terminal", "--passage", 2, 4, *pair)
    assert "from word 4: static against RMS dynamic evaluation" in turned.out
    signs = [re.findall(r"[+-](?=\s)", text.out.rpartition("\n\n")[0]) for text in (shown, turned)]
    assert signs[0]
    assert [{"+": "-", "-": "+"}[sign] for sign in signs[0]] == signs[1]
    for rule, said in (("adam", "--rule adam was not measured"), ("static", "with itself")):
        assert said in command("visualize", run, "--terminal", "--rule", rule).error
    error = command("visualize", run, "--terminal", "--passage", 2, 51).error
    assert "article 2 of split 'valid' has 50 words; it has no word 51" in error
    first = command("visualize", run, "--terminal", "--first", 2).out
    assert "2. Title 1, from word 1: " in first
    assert "numbered 1 to 2" in command("visualize", run, "--terminal", "--first", 3).error
    assert "--page-words" in command("visualize", run, "--page-words", 0).error
