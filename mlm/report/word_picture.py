"""Running text with every word coloured by what a rule gains on it, as a picture for papers.

The right half of Figure 2 of Wolf et al. 2018 (arXiv 1803.10631). Letters: N words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from mlm.base.errors import UserError
from mlm.base.names import EOS, rule_label
from mlm.report.drawing import (
    PAPER,
    Look,
    new_figure,
    project_style,
    save_figure,
    short_title,
)
from mlm.report.losses import LossTable

BETTER, NEUTRAL, WORSE = (0x43, 0x93, 0xC3), (0xFF, 0xFF, 0xFF), (0xD6, 0x60, 0x4D)


#: The colour of a gain g is (|g| / range) ** COLOUR_POWER of the way from white: the many
#: small differences stay visible beside the few large ones.
COLOUR_POWER = 0.6


CLIP_PERCENTILE = 95.0


ROUND_ENDS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Where colours may end, times a power of ten."""


UNDERLINED = 0.125
"""A word is underlined if its gain is at least this share of the range: the sign without colour."""


LINE_END = "↵"


_SIZE, _LINE = 8.0, 14.0  # points: font and line height


def colour_range(gain_N: np.ndarray) -> float:
    """Return the |gain| (nats) at which colours saturate: its 95th percentile, rounded up."""
    size = float(np.percentile(np.abs(gain_N), CLIP_PERCENTILE)) if len(gain_N) else 0
    return round_end(size)


def round_end(size: float) -> float:
    """Return the smallest round number (`ROUND_ENDS`) that is not below `size`; at least 0.01."""
    power = 10.0 ** np.floor(np.log10(max(size, 0.01)) + 1e-9)
    ends = [end * power for end in (*ROUND_ENDS, 10.0)]
    return float(next((end for end in ends if end >= size * (1 - 1e-9)), ends[-1]))


def word_colour(gain: float, limit: float) -> tuple[float, float, float]:
    """Return the RGB (0 to 1) of a gain in nats: blue above zero (better), white at zero, red
    below; saturated at `limit`."""
    share = min(abs(gain) / limit, 1.0) ** COLOUR_POWER
    end = BETTER if gain > 0 else WORSE
    red, green, blue = ((n + share * (e - n)) / 255 for n, e in zip(NEUTRAL, end, strict=True))
    return red, green, blue


def ink_on(colour: Sequence[float]) -> str:
    """Return black or white, whichever is easier to read on `colour` (WCAG luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


@dataclass(frozen=True)
class _Placed:
    """A word at `left` points from the text's edge on line `line`, `width` points wide."""

    text: str
    left: float
    line: int
    width: float
    heading: bool


def _heading_mask(words: Sequence[str]) -> list[bool]:
    """Whether each word belongs to a heading line, ` = X = ` or ` = = X = = `."""
    mask: list[bool] = []
    line: list[str] = []
    for word in [*words, EOS]:
        line.append(word)
        if word == EOS:
            body = line[:-1]
            heading = len(body) > 2 and body[0] == "=" and body[-1] == "="
            mask += [heading] * len(line)
            line = []
    return mask[: len(words)]


def _place_words(words: Sequence[str], width_pt: float) -> list[_Placed]:
    """Break words into lines of so many points; a line end ends its line."""
    renderer = RendererAgg(1, 1, 72)
    fonts = {
        heading: FontProperties(size=_SIZE, weight="bold" if heading else "normal")
        for heading in (False, True)
    }
    placed: list[_Placed] = []
    left, line = 0.0, 0
    for word, heading in zip(words, _heading_mask(words), strict=True):
        # A blank line's end follows the line before it: text stays dense.
        if word != EOS and placed and placed[-1].text == LINE_END:
            left, line = 0.0, line + 1
        text = LINE_END if word == EOS else short_title(word, 60)
        width, _, _ = renderer.get_text_width_height_descent(text, fonts[heading], False)
        width += 3.0
        if left + width > width_pt and left > 0:
            left, line = 0.0, line + 1
        placed.append(_Placed(text, left, line, width, heading))
        left += width + 1.5
    return placed


def passage_rows(table: LossTable, article: int, start: int, words: int) -> slice:
    """The rows of `words` words of an article from position `start` on, fewer at its end.

    Raises:
        UserError: there is no such word; the message counts articles and words from 1.
    """
    rows = table.rows(article)
    length = rows.stop - rows.start
    if not 0 <= start < length:
        raise UserError(
            f"article {table.number(article)} of split {table.split!r} has {length:,} words; it "
            f"has no word {start + 1}: choose one from 1 to {length}"
        )
    return slice(rows.start + start, min(rows.start + start + words, rows.stop))


def word_picture(
    table: LossTable,
    folder: Path,
    *,
    article: int,
    start: int = 0,
    words: int = 150,
    pair: tuple[str, str],
    protocol: str = "article",
    name: str = "words",
    look: Look = PAPER,
) -> list[Path]:
    """Draw `words` words of the article with index `article` from position `start` (from 0), each
    coloured by the loss of `pair[1]` minus that of `pair[0]` (nats gained); return the paths of
    `name` and its numbers, which count articles and words from 1.

    The colour range is that of the whole split, so that pictures compare. `UserError` if the
    article has no such words or a rule was not measured.
    """
    here = passage_rows(table, article, start, words)
    rule_N, against_N = (table.loss(rule, protocol) for rule in pair)
    limit = colour_range(against_N - rule_N)
    gain = (against_N - rule_N)[here]
    drawn = [str(word) for word in table.word_N[here]]
    with project_style():
        width = 72 * look.width - 16
        placed = _place_words(drawn, width)
        height = (placed[-1].line + 1) * _LINE
        figure = new_figure(look.width, (height + 72) / 72)
        figure.set_layout_engine("none")
        page = figure.add_axes((0, 0, 1, 1))
        page.axis("off")
        page.set_xlim(-8, width + 8)
        page.set_ylim(height + 40, -32)
        here_is = (
            f"{short_title(table.title(article), 30)}, words {start + 1:,}–{start + len(drawn):,}"
        )
        compared = f"{rule_label(pair[0])} vs {rule_label(pair[1])}, “{protocol}”"
        style = {"va": "center", "parse_math": False}
        page.text(0, -22, here_is, fontweight="bold", **style)
        page.text(0, -10, compared, color="#555555", **style)
        for word, value in zip(placed, gain, strict=True):
            _draw_word(page, word, word_colour(float(value), limit), value >= UNDERLINED * limit)
        _draw_legend(page, height + 8, limit, width)
        csv_rows = [
            {"article": table.number(article), "place": start + i + 1, "word": word}
            | {pair[0]: float(rule_N[here][i]), pair[1]: float(against_N[here][i])}
            | {"gain": float(gain[i])}
            for i, word in enumerate(drawn)
        ]
        return save_figure(figure, folder / name, csv_rows, look.formats)


def _draw_word(
    page: Axes, word: _Placed, colour: tuple[float, float, float], underlined: bool
) -> None:
    top = word.line * _LINE
    page.add_patch(Rectangle((word.left, top), word.width, _LINE - 2.5, color=colour, linewidth=0))
    if underlined:
        line = (word.left + 1, top + _LINE - 3.4), word.width - 2, 0.6
        page.add_patch(Rectangle(*line, color=ink_on(colour), linewidth=0))
    style: dict[str, Any] = {"weight": "bold"} if word.heading else {}
    page.text(
        word.left + word.width / 2,
        top + (_LINE - 2.5) * 0.72,
        word.text,
        fontsize=_SIZE,
        ha="center",
        va="baseline",
        color=ink_on(colour),
        parse_math=False,
        **style,
    )


def _draw_legend(page: Axes, top: float, limit: float, width: float) -> None:
    """A bar from worse to better, with the gains in nats."""
    left, length, steps = 34.0, min(200.0, width - 70), 120
    for step in range(steps):
        value = limit * (2 * (step + 0.5) / steps - 1)
        x, colour = left + length * step / steps, word_colour(value, limit)
        page.add_patch(Rectangle((x, top), length / steps + 0.2, 8, color=colour, linewidth=0))
    page.add_patch(
        Rectangle((left, top), length, 8, fill=False, edgecolor="#8a8a8a", linewidth=0.5)
    )
    text: dict[str, Any] = {"va": "center"}
    page.text(left - 5, top + 4, "worse", ha="right", **text)
    page.text(left + length + 5, top + 4, "better", ha="left", **text)
    for share in (-1, -0.5, 0, 0.5, 1):
        label = f"{share * limit:+.2g}".replace("-", "−") if share else "0"
        page.text(left + length * (share + 1) / 2, top + 14, label, ha="center", **text)
    page.text(left, top + 25, "gain, nats", ha="left", **text)
