"""What is said at the terminal: once, calmly where there is none, and bold only where it shows."""

from __future__ import annotations

import io
import sys
import time

import pytest

from mlm.base import terminal
from mlm.base.terminal import detail, note, progress_bar, say, stands_out


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_line_is_one_line_and_a_detail_stands_under_its_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say("[1/4] a\nb")
    detail("c")
    assert capsys.readouterr().err == "[1/4] a\\nb\n      c\n"
    assert len("[1/4] ") == len(terminal.INDENT)


def test_a_note_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        note("this test's own note")
    assert capsys.readouterr().err == "note: this test's own note\n"


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Screen(), {}, True),
        (io.StringIO(), {}, False),
        (Screen(), {"NO_COLOR": "1"}, False),
        (Screen(), {"NO_COLOR": ""}, True),
        (Screen(), {"TERM": "dumb"}, False),
    ],
)
def test_bold_is_for_terminals_that_show_it(
    stream: io.StringIO, environment: dict, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert stands_out(stream) == wanted


def test_a_bar_on_a_terminal_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar("training", 3, initial=1) as bar:
        bar.set_postfix_str("perplexity 170 per word", refresh=False)
        bar.refresh()
        assert "training  33 % |" in screen.getvalue()
        assert screen.getvalue().endswith("left, perplexity 170 per word")
    assert "\n" not in screen.getvalue()
    assert not screen.getvalue().split("\r")[-2].strip()


def test_a_bar_elsewhere_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("training", 30) as bar:
        for _ in range(30):
            bar.update()
    assert capsys.readouterr().err == ""  # it was quick
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.05)
    with progress_bar("training", 4) as bar:
        for _ in range(4):
            time.sleep(0.06)
            bar.set_postfix_str("perplexity 9", refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("      training: 25 %, ")
    assert all(line.endswith(" left, perplexity 9") for line in lines)


def test_a_quiet_bar_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar("training", 3, quiet=True) as bar:
        bar.update()
    assert screen.getvalue() == ""
