"""A passage in the terminal, every word on the colour of what a rule gains on it."""

from __future__ import annotations

import io

from rich.console import Console
from rich.style import Style
from rich.text import Text

from mlm.base.names import EOS, rule_label
from mlm.report.drawing import drawable
from mlm.report.losses import LossTable
from mlm.report.word_picture import UNDERLINED, colour_range, passage_rows, word_colour


def passage_in_colours(
    table: LossTable,
    article: int,
    start: int,
    *,
    pair: tuple[str, str],
    protocol: str,
    words: int = 160,
    width: int = 80,
    colours: bool = True,
) -> str:
    """Return `words` words of the article with index `article` from position `start` (from 0),
    ready to print.

    Blue and underlined: `pair[0]` predicts the word better than `pair[1]`; red: worse. The range is
    that of the whole split. Without `colours`, `+` and `-` behind a word say the same of large
    gains and losses. Lines have `width` columns. Raises `UserError` if the article has no such
    words or a rule was not measured.
    """
    here = passage_rows(table, article, start, words)
    gain_N = table.loss(pair[1], protocol) - table.loss(pair[0], protocol)
    limit = colour_range(gain_N)
    text = Text()
    for word, gain in zip(table.word_N[here], gain_N[here], strict=True):
        ends_line = word == EOS
        if text.plain and not text.plain.endswith("\n"):
            text.append("\n" if ends_line else " ")
        if not ends_line:
            text.append_text(_painted(drawable(str(word)), float(gain), limit, colours))
    head = (
        f"{table.number(article)}. {drawable(table.title(article))}, from word {start + 1:,}: "
        f"{rule_label(pair[0])} against {rule_label(pair[1])}, protocol {protocol}"
    )
    if colours:
        ends = [_painted(f"{x:+g}", x, limit, colours) for x in (-limit, limit)]
        legend = Text(" to ").join(ends).append(" nats gained per word")
    else:
        legend = Text(f"+ gained, - lost {UNDERLINED * limit:g} nats or more")
    system = "truecolor" if colours else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=colours)
    shown = [Text(head), Text(), *text.wrap(console, width), Text(), legend]
    with console.capture() as capture:
        for line in shown:
            line.rstrip()
            console.print(line, soft_wrap=True)
    return capture.get().rstrip("\n")


def _painted(word: str, gain: float, limit: float, colours: bool) -> Text:
    """The word in its colour, or with its sign."""
    large = abs(gain) >= UNDERLINED * limit
    if not colours:
        return Text(word + ("+" if gain > 0 else "-") * large)
    red, green, blue = (round(255 * part) for part in word_colour(gain, limit))
    line = large and gain > 0
    return Text(word, Style(color="#000000", bgcolor=f"rgb({red},{green},{blue})", underline=line))
