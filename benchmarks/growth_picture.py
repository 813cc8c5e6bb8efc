"""The pictures of `growth`: an axis each, log-log, with a dashed line of linear growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from mlm.report.drawing import new_figure, project_style, save_figure

LABELS = {
    "lanes": "lanes B",
    "hidden": "hidden size H = E",
    "segment": "tokens per segment M",
    "unroll": "updates of an unroll T",
    "vocabulary": "words in the vocabulary V",
}
STYLES = (("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"))
"""Colour (Okabe and Ito) and shape of the series in turn."""
PER_TOKEN = ("lanes", "segment", "unroll")
"""Axes whose size is in the number of tokens: linear growth is a constant time per token."""
DASHED: dict[str, Any] = {"linewidth": 0.8, "linestyle": (0, (4, 3))}


def draw(axis: str, rows: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """Draw the rows of one axis as `stem`.png and .svg beside `stem`.csv; return the paths."""
    points = [row for row in rows if "us/token" in row or "peak MB" in row]
    with project_style():
        base = any("peak MB" in row for row in points)
        figure = new_figure(9.6 if base else 5.4, 3.8)
        panels = figure.subplots(1, 1 + base, squeeze=False)[0]
        key, unit = ("ms/segment", "ms per update") if base else ("us/token", "µs per token")
        _panel(panels[0], axis, points, key)
        panels[0].set_ylabel(f"time ({unit})")
        if base:
            _panel(panels[1], axis, points, "peak MB")
            panels[1].set_ylabel("peak memory (MB)")
        panels[0].legend(fontsize=8, loc="lower left" if base else "best")
        columns = list(dict.fromkeys(key for row in points for key in row))
        return save_figure(figure, stem, [{c: row.get(c, "") for c in columns} for row in points])


def _panel(panel: Axes, axis: str, points: Sequence[dict[str, Any]], key: str) -> None:
    """One quantity of every series against the size, and what linear growth would be."""
    panel.set_xscale("log")
    for k, what in enumerate(dict.fromkeys(row["what"] for row in points)):
        own = [row for row in points if row["what"] == what and key in row]
        colour, marker = STYLES[k % len(STYLES)]
        x, y = [row["size"] for row in own], [row[key] for row in own]
        panel.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, label=what)
        panel.plot(x, [y[0] * part for part in linear(axis, own, key)], color=colour, **DASHED)
    # One entry for the dashed lines of all series.
    panel.plot([], [], color="#555555", label=_meaning(axis), **DASHED)
    sizes = sorted({row["size"] for row in points})
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.tick_params(axis="x", labelsize=8)
    if axis == "unroll" and key != "peak MB":  # hardly differs: from zero
        panel.set_ylim(bottom=0)
    else:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(LABELS[axis])


def linear(axis: str, own: Sequence[dict[str, Any]], key: str) -> list[float]:
    """How often the first value linear growth would give at every point of a series."""
    if key != "peak MB" and axis in PER_TOKEN:
        return [1.0] * len(own)
    name = "linear in" if axis == "hidden" else "size"
    return [row[name] / own[0][name] for row in own]


def _meaning(axis: str) -> str:
    return "linear in the weights" if axis == "hidden" else "linear growth of the whole"
