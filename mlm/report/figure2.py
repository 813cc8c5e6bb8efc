"""Figure 2 of Wolf et al. 2018 (arXiv 1803.10631): perplexity gained over successive articles.

Letters: N words, P points of the curve (windows of 200 words).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mlm.base.errors import UserError
from mlm.base.names import STATIC, rule_label, rule_order
from mlm.report.drawing import new_figure, project_style, rule_style, save_figure, short_title
from mlm.report.evaluation import half_gains
from mlm.report.losses import LossTable

WINDOW = 200  # words per point


SMOOTHED = 8  # points per moving average: 1,600 words


_INK, _FAINT = "#222222", "#8a8a8a"


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
    """The windows of Figure 2: their place, and each rule's perplexity on them."""

    place_P: np.ndarray  # 0, 1, ... for article A, B, ...
    from_P: np.ndarray  # word positions within the article, `to` exclusive
    to_P: np.ndarray
    centre_P: np.ndarray  # words from the start of article A
    perplexity_P: dict[str, np.ndarray]


def window_points(
    table: LossTable, protocol: str, rules: Sequence[str], articles: Sequence[int]
) -> Points:
    """Return each rule's perplexity per window of 200 words.

    Windows start anew at each article, so that none mixes two; a last window of fewer than 100
    words joins the one before it.
    """
    losses = {rule: table.loss(rule, protocol) for rule in rules}
    spans: list[tuple[int, int, int, float]] = []
    perplexities: dict[str, list[float]] = {rule: [] for rule in rules}
    offset = 0
    for place, article in enumerate(articles):
        rows = table.rows(article)
        words = rows.stop - rows.start
        count = max(1, (words + WINDOW // 2) // WINDOW)
        edges = [*(WINDOW * point for point in range(count)), words]
        for start, stop in itertools.pairwise(edges):
            spans.append((place, start, stop, offset + (start + stop) / 2))
            for rule, loss_N in losses.items():
                mean = float(loss_N[rows.start + start : rows.start + stop].mean())
                perplexities[rule].append(float(np.exp(min(mean, 700.0))))
        offset += words
    return Points(
        *(np.array(column) for column in zip(*spans, strict=True)),
        perplexity_P={rule: np.array(values) for rule, values in perplexities.items()},
    )


def smooth(gain_P: np.ndarray, place_P: np.ndarray, *, over_borders: bool) -> np.ndarray:
    """Return the moving average of `gain_P`, over article borders or within each article."""
    if over_borders:
        return moving_average(gain_P)
    parts = [moving_average(gain_P[place_P == place]) for place in np.unique(place_P)]
    return np.concatenate(parts)


def panels_of(rules: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (rule, against) pairs to draw: the paper's two, as far as they were measured."""
    adapted = [rule for rule in rules if rule != STATIC]
    if "two_levels" in adapted:
        finer = [("three_levels", "two_levels")] if "three_levels" in adapted else []
        return [("two_levels", STATIC), *finer]
    best = next((rule for rule in ("three_levels", "rms", "sgd") if rule in adapted), adapted[0])
    return [(best, STATIC)]


def figure2(
    table: LossTable,
    folder: Path,
    *,
    articles: int = 8,
    first: int = 0,
    protocol: str | None = None,
    suffix: str = "",
) -> list[Path]:
    """Draw the gain in perplexity over `articles` successive articles; return the paths written.

    Top: 2 levels vs static; below, on its own scale: 3 levels vs 2 levels. One dot per 200 words;
    the line is a centred moving average of 8 dots (1,600 words). In protocol `stream` it runs over
    article borders as in the paper; in `article`, where the weights start anew, it stops at each
    border. `protocol` None takes `stream` where measured. Writes figure2{suffix}.png, .svg, .csv.
    """
    present = table.compared_protocols()
    protocol = protocol or present[-1]
    if protocol not in present:
        raise UserError(
            f"{table.source}: protocol {protocol!r} was not measured on split {table.split!r}; "
            f"present: {', '.join(present)}"
        )
    chosen = table.articles[first : first + articles]
    if not chosen or first < 0:
        raise UserError(
            f"no article to draw: {articles} articles from number {first} of the "
            f"{len(table.articles)} in split {table.split!r}; choose others"
        )
    pairs = panels_of(table.rules(protocol))
    rules = sorted({STATIC, *(rule for pair in pairs for rule in pair)}, key=rule_order)
    points = window_points(table, protocol, rules, chosen)
    curves: dict[str, np.ndarray] = {}
    with project_style():
        key_height = 0.17 * ((len(chosen) + 1) // 2) + 0.25
        heights = [2.5, 1.7][: len(pairs)]
        figure = new_figure(9.5, sum(heights) + key_height + 0.7)
        grid = figure.add_gridspec(len(pairs) + 1, 1, height_ratios=[*heights, key_height])
        panels: list[Axes] = []
        for row, (rule, against) in enumerate(pairs):
            panel = figure.add_subplot(grid[row], sharex=panels[0] if panels else None)
            panels.append(panel)
            gain_P = points.perplexity_P[against] - points.perplexity_P[rule]
            smooth_P = smooth(gain_P, points.place_P, over_borders=protocol != "article")
            curves[f"gain_{rule}_vs_{against}"] = gain_P
            curves[f"smoothed_{rule}_vs_{against}"] = smooth_P
            _draw_gain(panel, points, gain_P, smooth_P, protocol, rule)
            title = f"{rule_label(rule)} vs {rule_label(against)}"
            panel.set_title(title[:1].upper() + title[1:], pad=16 if row == 0 else 6)
            panel.set_ylabel("gain in perplexity")
        _draw_borders(panels, table, chosen)
        panels[-1].set_xlabel(
            f"words read, {table.split} split, protocol “{protocol}” · dots: {WINDOW} words, "
            f"line: centred average of {SMOOTHED} dots"
        )
        _draw_key(figure.add_subplot(grid[-1]), table, protocol, pairs[0], chosen)
        rows = _csv_rows(table, points, chosen, curves)
        return save_figure(figure, folder / f"figure2{suffix}", rows)


def _draw_gain(
    panel: Axes,
    points: Points,
    gain_P: np.ndarray,
    smooth_P: np.ndarray,
    protocol: str,
    rule: str,
) -> None:
    colour = rule_style(rule)["color"]
    panel.axhline(0, color=_INK, linewidth=0.8)
    panel.plot(points.centre_P, gain_P, ".", color=colour, markersize=3.5, alpha=0.35, mew=0)
    parts = [points.place_P >= 0]
    if protocol == "article":
        parts = [points.place_P == place for place in np.unique(points.place_P)]
    for part in parts:
        panel.plot(points.centre_P[part], smooth_P[part], "-", color=colour, linewidth=1.8)
        if part.sum() == 1:  # a lone point has no line
            panel.plot(points.centre_P[part], smooth_P[part], "o", color=colour, markersize=3.5)
    # The line sets the scale, dots may leave it: exp() gives single windows a long tail.
    low = min(0.0, float(smooth_P.min()), float(np.percentile(gain_P, 5)))
    high = max(0.0, float(smooth_P.max()), float(np.percentile(gain_P, 95)))
    margin = 0.08 * (high - low) or 1.0
    panel.set_ylim(low - margin, high + margin)


def _draw_borders(panels: Sequence[Axes], table: LossTable, chosen: Sequence[int]) -> None:
    """Dashed lines at the articles' borders, their letters above the top panel."""
    lengths = [table.rows(article).stop - table.rows(article).start for article in chosen]
    borders = np.cumsum([0, *lengths])
    for panel in panels:
        panel.set_xlim(0, borders[-1])
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
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
) -> None:
    """Letters, titles, lengths and the gain in the first and second half of each article."""
    panel.axis("off")
    rule_N, against_N = (table.loss(rule, protocol) for rule in pair)
    per_column = (len(chosen) + 1) // 2
    text = {"va": "center", "fontsize": 7.5, "parse_math": False}
    panel.set_xlim(0, 2)
    panel.set_ylim(per_column, -1)
    for column in range(min(2, len(chosen))):
        panel.text(column + 0.62, -0.8, "words", ha="right", color=_FAINT, **text)
        panel.text(column + 0.93, -0.8, "gain, 1st → 2nd half", ha="right", color=_FAINT, **text)
    for place, article in enumerate(chosen):
        column, row = divmod(place, per_column)
        rows = table.rows(article)
        gains = half_gains(against_N[rows], rule_N[rows])
        halves = first_to_second(gains)
        panel.text(column, row, letter(place), fontweight="bold", **text)
        panel.text(
            column + (0.035 if len(chosen) <= 26 else 0.05),
            row,
            short_title(table.title(article), 36),
            **text,
        )
        panel.text(column + 0.62, row, f"{rows.stop - rows.start:,}", ha="right", **text)
        panel.text(column + 0.93, row, halves.replace("-", "−"), ha="right", **text)


def _csv_rows(
    table: LossTable, points: Points, chosen: Sequence[int], curves: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    rows = []
    for point, place in enumerate(points.place_P.astype(int)):
        rows.append(
            {
                "letter": letter(place),
                "article": chosen[place],
                "title": table.title(chosen[place]),
                "from": int(points.from_P[point]),
                "to": int(points.to_P[point]),
                "words_read": float(points.centre_P[point]),
            }
            | {f"perplexity_{r}": float(v[point]) for r, v in points.perplexity_P.items()}
            | {name: float(curve[point]) for name, curve in curves.items()}
        )
    return rows
