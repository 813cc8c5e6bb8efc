"""A passage in the terminal: its words, colours, lines."""

from __future__ import annotations

import re

import pytest
from fake_run import made_up_losses
from rich.cells import cell_len

from mlm.base.errors import UserError
from mlm.page.passage import passage_in_colours
from mlm.report.losses import LossTable

COLOUR = re.compile(r"\x1b\[(4;)?38;2;0;0;0;48;2;(\d+);(\d+);(\d+)m(.*?)\x1b\[0m")


def table() -> LossTable:
    words = ["good", "bad", "same", "<eos>", "\x1b[31m", "end"]
    found = made_up_losses([words], rules=("static", "rms"), protocols=("article",))
    found.losses["static"][:] = [4, 1, 2, 2, 2, 2]
    found.losses["rms"][:] = [0, 5, 2, 2, 2, 2]
    return found


def shown(start: int = 0, **options) -> str:
    return passage_in_colours(
        table(), 0, start, pair=("rms", "static"), protocol="article", **options
    )


def test_words_that_gain_are_blue_and_underlined_and_those_that_lose_red():
    words = {m[5]: m for m in COLOUR.finditer(shown())}
    assert [*words][:3] == ["good", "bad", "same"]
    red, _, blue = map(int, words["good"].groups()[1:4])
    assert blue > red
    assert words["good"][1] == "4;"  # underlined
    red, _, blue = map(int, words["bad"].groups()[1:4])
    assert red > blue
    assert words["bad"][1] is None
    assert words["same"].groups()[1:4] == ("255", "255", "255")


def test_without_colours_a_sign_says_the_same():
    plain = shown(colours=False)
    assert "\x1b" not in plain
    assert "good+ bad- same\n" in plain
    assert plain.endswith("\n+ gained, - lost 0.5 nats or more")


def test_control_characters_of_a_text_never_reach_the_terminal():
    assert "\x1b[31m" not in shown()
    assert "\N{WHITE SQUARE}[31m" in shown()


@pytest.mark.parametrize("letters", ["word", "言葉"])
def test_lines_keep_within_the_width(letters: str):
    words = [f"{letters}{i}" for i in range(100)]
    wide = passage_in_colours(
        made_up_losses([words]),
        0,
        0,
        pair=("rms", "static"),
        protocol="article",
        width=30,
        colours=False,
    )
    lines = wide.split("\n")[2:-2]
    assert max(map(cell_len, lines)) <= 30  # columns: some characters take two
    assert re.sub(r"[+-]", "", " ".join(lines)).split() == words


def test_a_passage_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"article 1 of .* has 6 words; it has no word 7: choose"):
        shown(6)
