"""Figure 2 of Wolf et al. 2018 (arXiv 1803.10631): perplexity gained over successive articles.

Letters: N words, P points of the curve (windows of 200 words).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlm.base.errors import UserError
from mlm.base.names import STATIC, rule_label, rule_order
from mlm.report.drawing import (
    PAPER,
    Look,
    new_figure,
    project_style,
    rule_style,
    save_figure,
    short_title,
)
from mlm.report.evaluation import half_gains
from mlm.report.losses import LossTable, compared

WINDOW = 200  # words per point


SMOOTHED = 8  # points per moving average: 1,600 words


NATS, PERPLEXITY = "nats", "perplexity"


_INK, _GREY, _FAINT = "#222222", "#555555", "#8a8a8a"


def letter(place: int) -> str:
    """Return A, B, ... Z, AA, AB, ... for 0, 1, ..."""
    return ("" if place < 26 else letter(place // 26 - 1)) + chr(ord("A") + place % 26)


def first_to_second(gains: tuple[float | None, float | None]) -> str:
    """Return the gains of two halves as `22.4 → 20.3`, a dash for one without words."""
    return " → ".join("–" if gain is None else f"{gain:.1f}" for gain in gains)


def moving_average(points_P: np.ndarray, width: int = SMOOTHED) -> np.ndarray:
    """Return the centred moving average (P,), over fewer points at both ends.

    An even `width` is centred by giving the two outermost of width + 1 points half weight.
    """
    kernel = np.ones(width) if width % 2 else np.r_[0.5, np.ones(width - 1), 0.5]
    sums = np.convolve(points_P, kernel)
    weights = np.convolve(np.ones(len(points_P)), kernel)
    start = len(kernel) // 2
    return (sums / weights)[start : start + len(points_P)]


@dataclass(frozen=True)
class Points:
    """The windows of Figure 2: their place, and each rule's loss on them."""

    place_P: np.ndarray  # 0, 1, ... for article A, B, ...
    from_P: np.ndarray  # word positions within the article, `to` exclusive
    to_P: np.ndarray
    centre_P: np.ndarray  # words from the start of article A
    loss_P: dict[str, np.ndarray]  # nats per word

    def perplexity(self, rule: str) -> np.ndarray:
        """Each window's perplexity under a rule, (P,)."""
        return np.exp(np.minimum(self.loss_P[rule], 700.0))

    def gain(self, unit: str, rule: str, against: str) -> np.ndarray:
        """What `rule` gains over `against` on each window, (P,)."""
        if unit == PERPLEXITY:
            return self.perplexity(against) - self.perplexity(rule)
        return self.loss_P[against] - self.loss_P[rule]


def window_points(
    table: LossTable, protocol: str, rules: Sequence[str], articles: Sequence[int]
) -> Points:
    """Return each rule's loss per window of 200 words.

    Windows start anew at each article, so that none mixes two; a last window of fewer than 100
    words joins the one before it.
    """
    losses = {rule: table.loss(rule, protocol) for rule in rules}
    spans: list[tuple[int, int, int, float]] = []
    means: dict[str, list[float]] = {rule: [] for rule in rules}
    offset = 0
    for place, article in enumerate(articles):
        rows = table.rows(article)
        words = rows.stop - rows.start
        count = max(1, (words + WINDOW // 2) // WINDOW)
        edges = [*(WINDOW * point for point in range(count)), words]
        for start, stop in itertools.pairwise(edges):
            spans.append((place, start, stop, offset + (start + stop) / 2))
            for rule, loss_N in losses.items():
                means[rule].append(float(loss_N[rows.start + start : rows.start + stop].mean()))
        offset += words
    columns = (np.array(column) for column in zip(*spans, strict=True))
    return Points(*columns, loss_P={rule: np.array(values) for rule, values in means.items()})


def smooth(gain_P: np.ndarray, place_P: np.ndarray) -> np.ndarray:
    """Return the moving average of `gain_P` within each article."""
    parts = [moving_average(gain_P[place_P == place]) for place in np.unique(place_P)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Panel:
    """One panel: curves of some rules' gain over another rule."""

    unit: str
    rules: tuple[str, ...]
    against: str

    @property
    def title(self) -> str:
        """What the panel shows."""
        if len(self.rules) != 1:
            return f"Gain over {rule_label(self.against)}"
        (rule,) = self.rules
        found = f"{rule_label(rule)} over {rule_label(self.against)}"
        return found[:1].upper() + found[1:]


def panels_of(rules: Sequence[str], best: str, against: str = STATIC) -> list[Panel]:
    """The panels to draw: the gain over `against` of the best rule, of RMS dynamic evaluation and
    of 2 levels, in nats and in perplexity; then what the paper's second panel shows, 3 levels over
    2 levels. All as far as they were measured."""
    wanted = dict.fromkeys((best, "rms", "two_levels"))
    shown = tuple(rule for rule in wanted if rule in rules and rule != against)
    panels = [Panel(NATS, shown, against), Panel(PERPLEXITY, shown, against)]
    if against == STATIC and {"two_levels", "three_levels"} <= set(rules):
        panels.append(Panel(PERPLEXITY, ("three_levels",), "two_levels"))
    return panels


def figure2(
    table: LossTable,
    folder: Path,
    *,
    articles: int = 8,
    first: int = 1,
    protocol: str | None = None,
    pair: tuple[str | None, str | None] = (None, None),
    suffix: str = "",
    look: Look = PAPER,
) -> list[Path]:
    """Draw the gain over `articles` successive articles from number `first`, counted from 1;
    return the paths written.

    Panels are those of `panels_of`, under an upper one's words. One dot of the first rule per 200
    words, a triangle at the edge for one outside the axes; lines are centred moving averages of 8
    dots (1,600 words) within each article. `protocol` None takes `stream` where measured; `pair`
    None takes the best learned rule against static. Writes figure2{suffix} and its numbers.
    """
    present = table.compared_protocols()
    protocol = protocol or present[-1]
    if protocol not in present:
        raise UserError(
            f"{table.source}: protocol {protocol!r} was not measured on split {table.split!r}; "
            f"present: {', '.join(present)}"
        )
    start = table.articles.index(table.numbered(first))
    chosen = table.articles[start : start + articles]
    rule, against = compared(table, protocol, pair)
    panels = panels_of(table.rules(protocol), rule, against)
    rules = sorted({against, *(r for p in panels for r in (*p.rules, p.against))}, key=rule_order)
    points = window_points(table, protocol, rules, chosen)
    columns = 1 if look.narrow else 2
    key = 0.155 * (math.ceil(len(chosen) / columns) + (4 if columns == 1 else 2.5))
    with project_style():
        lines = math.ceil(len(panels[0].rules) / (columns + 1))
        heights = [1.25 if len(p.rules) > 1 else 0.9 for p in panels]
        figure, axes, below = _stacked(look.width, 0.08 + 0.17 * lines, heights, key)
        for one, panel in zip(axes, panels, strict=True):
            _draw_panel(one, points, panel)
            if one is axes[0] or panel.against != against:
                one.set_title(panel.title, pad=14 if one is axes[0] else 4)
        _draw_borders(axes, table, chosen, 4 if look.narrow else 6)
        axes[-1].set_xlabel(f"words read ({table.split} split, protocol “{protocol}”)")
        where = {"loc": "upper right", "ncols": columns + 1, "columnspacing": 1.2}
        figure.legend(*axes[0].get_legend_handles_labels(), **where, borderaxespad=0.2)
        _draw_key(below, table, protocol, (rule, against), chosen, columns)
        rows = _csv_rows(table, points, chosen, panels)
        return save_figure(figure, folder / f"figure2{suffix}", rows, look.formats)


def _stacked(
    width: float, legend: float, heights: Sequence[float], key: float
) -> tuple[Figure, list[Axes], Axes]:
    """A figure of panels that share their words, a legend above and a key below them; inches.

    Placed by hand: a layout that is fitted to its letters would change with the titles.
    """
    left, right, above, label = 0.52, 0.2, 0.3, 0.45
    total = legend + sum(heights) + above * len(heights) + label + key
    figure = new_figure(width, total)
    figure.set_layout_engine("none")
    share = (width - left - right) / width
    axes: list[Axes] = []
    top = total - legend
    for height in heights:
        top -= above + height
        place = (left / width, top / total, share, height / total)
        axes.append(figure.add_axes(place, sharex=axes[0] if axes else None))
    below = figure.add_axes((0.08 / width, 0.04 / total, 1 - 0.16 / width, key / total))
    return figure, axes, below


def _draw_panel(axes: Axes, points: Points, panel: Panel) -> None:
    """Dots of the first rule and a line of every rule; the lines and most dots set the scale."""
    axes.axhline(0, color=_INK, linewidth=0.6)
    axes.set_ylabel("gain, nats per word" if panel.unit == NATS else "gain, perplexity")
    gains = {rule: points.gain(panel.unit, rule, panel.against) for rule in panel.rules}
    lines = {rule: smooth(gain_P, points.place_P) for rule, gain_P in gains.items()}
    dots_P = gains[panel.rules[0]]
    low = min(0.0, *(line.min() for line in lines.values()), np.percentile(dots_P, 2))
    high = max(0.0, *(line.max() for line in lines.values()), np.percentile(dots_P, 98))
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    axes.set_ylim(low, high)
    dots: dict[str, Any] = {"linestyle": "", "alpha": 0.4, "markeredgewidth": 0}
    dots["color"] = rule_style(panel.rules[0])["color"]
    axes.plot(points.centre_P, dots_P, ".", markersize=3, **dots)
    for outside, edge, sign in ((dots_P > high, high, "^"), (dots_P < low, low, "v")):
        at = points.centre_P[outside]
        axes.plot(at, np.full(len(at), edge), sign, markersize=3.5, clip_on=False, **dots)
    for rule in reversed(panel.rules):
        style, label = rule_style(rule), rule_label(rule)
        for place in np.unique(points.place_P):
            part = points.place_P == place
            alone = "o" if part.sum() == 1 else ""  # a lone point has no line
            axes.plot(
                points.centre_P[part],
                lines[rule][part],
                marker=alone,
                markersize=3,
                label=None if place else label,
                **style,
            )


def _draw_borders(
    panels: Sequence[Axes], table: LossTable, chosen: Sequence[int], ticks: int
) -> None:
    """Dashed lines at the articles' borders, their letters above the top panel."""
    lengths = [table.rows(article).stop - table.rows(article).start for article in chosen]
    borders = np.cumsum([0, *lengths])
    for panel in panels:
        panel.set_xlim(0, borders[-1])
        panel.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        for border in borders[1:-1]:
            panel.axvline(border, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    for panel in panels[:-1]:
        panel.tick_params(labelbottom=False)
    for place, (start, stop) in enumerate(itertools.pairwise(borders)):
        if stop - start > 0.012 * len(letter(place)) * borders[-1]:
            panels[0].annotate(
                letter(place),
                ((start + stop) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
            )


def _draw_key(
    panel: Axes,
    table: LossTable,
    protocol: str,
    pair: tuple[str, str],
    chosen: Sequence[int],
    columns: int,
) -> None:
    """How to read it; letters, titles, lengths and the gain in both halves of each article."""
    panel.axis("off")
    rule_N, against_N = (table.loss(rule, protocol) for rule in pair)
    per_column = math.ceil(len(chosen) / columns)
    text = {"va": "center", "parse_math": False}
    panel.set_xlim(0, columns)
    notes = [
        f"Dots: {WINDOW} words (▲▼ beyond).",
        f"Lines: mean of {SMOOTHED} dots in an article.",
        "Below: perplexity gained in an article's halves.",
    ]
    notes = [" ".join(notes)] if columns > 1 else notes
    panel.set_ylim(per_column - 0.5, -2 - max(1, len(notes) - 0.5))
    for place, note in enumerate(notes):
        panel.text(0, place - 1 - len(notes), note, color=_GREY, **text)
    for column in range(min(columns, len(chosen))):
        panel.text(column + 0.6, -0.8, "words", ha="right", color=_GREY, **text)
        panel.text(column + 0.97, -0.8, "1st → 2nd half", ha="right", color=_GREY, **text)
    for place, article in enumerate(chosen):
        column, row = divmod(place, per_column)
        rows = table.rows(article)
        gains = half_gains(against_N[rows], rule_N[rows])
        halves = first_to_second(gains)
        panel.text(column, row, letter(place), fontweight="bold", **text)
        panel.text(
            column + (0.035 if len(chosen) <= 26 else 0.05),
            row,
            short_title(table.title(article), 25),
            **text,
        )
        panel.text(column + 0.6, row, f"{rows.stop - rows.start:,}", ha="right", **text)
        panel.text(column + 0.97, row, halves.replace("-", "−"), ha="right", **text)


def _csv_rows(
    table: LossTable, points: Points, chosen: Sequence[int], panels: Sequence[Panel]
) -> list[dict[str, Any]]:
    columns = {f"perplexity_{rule}": points.perplexity(rule) for rule in points.loss_P}
    columns |= {f"nats_{rule}": loss_P for rule, loss_P in points.loss_P.items()}
    for panel in panels:
        for rule in panel.rules:
            gain_P = points.gain(panel.unit, rule, panel.against)
            name = f"{panel.unit}_{rule}_vs_{panel.against}"
            columns |= {f"gain_{name}": gain_P, f"smoothed_{name}": smooth(gain_P, points.place_P)}
    return [
        {
            "letter": letter(place),
            "article": table.number(chosen[place]),
            "title": table.title(chosen[place]),
            "from": int(points.from_P[point]),
            "to": int(points.to_P[point]),
            "words_read": float(points.centre_P[point]),
        }
        | {name: float(values[point]) for name, values in columns.items()}
        for point, place in enumerate(points.place_P.astype(int))
    ]
