"""A passage in the terminal, every word on the colour of what a rule gains on it."""

from __future__ import annotations

from mlm.base.names import EOS, rule_label
from mlm.report.drawing import drawable
from mlm.report.losses import LossTable
from mlm.report.word_picture import UNDERLINED, colour_range, passage_rows, word_colour

_RESET = "\x1b[0m"


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
    lines, used = [""], 0
    for row in range(here.start, here.stop):
        word = str(table.word_N[row])
        if word == EOS:
            if lines[-1]:
                lines.append("")
            used = 0
            continue
        shown, columns = _painted(drawable(word), float(gain_N[row]), limit, colours)
        if used and used + columns + 1 > width:
            lines.append("")
            used = 0
        lines[-1] += " " * bool(used) + shown
        used += columns + bool(used)
    head = (
        f"{table.number(article)}. {drawable(table.title(article))}, from word {start + 1:,}: "
        f"{rule_label(pair[0])} against {rule_label(pair[1])}, protocol {protocol}"
    )
    ends = [
        _painted(f"{sign}{limit:g}", float(f"{sign}{limit}"), limit, colours)[0] for sign in "-+"
    ]
    return "\n".join([head, "", *lines, "", f"{ends[0]} to {ends[1]} nats gained per word"])


def _painted(word: str, gain: float, limit: float, colours: bool) -> tuple[str, int]:
    """The word with its colour, and how many columns it takes."""
    large = abs(gain) >= UNDERLINED * limit
    if not colours:
        shown = word + ("+" if gain > 0 else "-") * large
        return shown, len(shown)
    red, green, blue = (round(255 * part) for part in word_colour(gain, limit))
    line = ";4" if large and gain > 0 else ""
    return f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}{line}m{word}{_RESET}", len(word)
