"""The picture of `recall`: share of right answers against number of pairs, and against distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mlm.report.drawing import new_figure, project_style, rule_style, save_figure

LINES: dict[str, tuple[str, str, str]] = {
    "static": ("static LSTM", "static", "o"),
    "static+cache": ("neural cache", "static+cache", "o"),
    "rms": ("RMS, LSTM", "rms", "o"),
    "three_levels": ("3 levels, LSTM", "three_levels", "o"),
    "rms, output": ("RMS, output layer", "rms", "s"),
    "three_levels, output": ("3 levels, output layer", "three_levels", "s"),
    "best": ("best (4 levels, extensions)", "four_levels", "D"),
}
"""Label, style and sign of the columns."""
CHANCE: dict[str, Any] = {"color": "#777777", "linewidth": 0.8, "linestyle": (0, (4, 3))}

Rows = Sequence[Mapping[str, Any]]


def draw(tables: Mapping[str, Rows], stem: Path) -> list[Path]:
    """Draw `stem`.png and .svg beside `stem`.csv; spans are those of the seeds."""
    pairs = tables["recall_pairs"]
    panels = {
        "MQAR": [row for row in pairs if row["task"] == "MQAR"],
        "forgetting, keys bound again": [row for row in pairs if row["bound"] == "again"],
        "both tasks, by distance": tables["recall_distance"],
    }
    with project_style():
        figure = new_figure(9.6, 3.2)
        axes = figure.subplots(1, len(panels), sharey=True)
        drawn: list[dict[str, Any]] = []
        for panel, (title, rows) in zip(axes, panels.items(), strict=True):
            drawn += _panel(panel, title, rows)
        axes[0].set_ylabel("share of answers that are right")
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return save_figure(figure, stem, drawn, ("png", "svg"))


def _panel(panel: Axes, title: str, rows: Rows) -> list[dict[str, Any]]:
    """One panel; returns what it shows."""
    by_pairs = bool(rows) and "pairs" in rows[0]
    places = [float(row["pairs"] if by_pairs else (row["from"] * row["to"]) ** 0.5) for row in rows]
    drawn: list[dict[str, Any]] = []
    panel.set_xscale("log")
    for column, (label, style, sign) in LINES.items():
        own = [(x, row) for x, row in zip(places, rows, strict=True) if column in row]
        if not own:
            continue
        x, y = [x for x, _ in own], [row[column] for _, row in own]
        how = rule_style(style)
        panel.plot(x, y, marker=sign, markersize=3.5, label=label, **how)
        spans = [row.get(f"{column} interval", [row[column]] * 2) for _, row in own]
        panel.vlines(x, [s[0] for s in spans], [s[1] for s in spans], how["color"], linewidth=0.8)
        drawn += [
            {"panel": title, "rule": column, "x": x, "share": row[column], "low": low, "high": high}
            for (x, row), (low, high) in zip(own, spans, strict=True)
        ]
    if by_pairs:
        panel.plot(places, [row["chance"] for row in rows], label="one of the values", **CHANCE)
    panel.xaxis.set_major_locator(FixedLocator(places))
    panel.xaxis.set_minor_locator(NullLocator())
    names = [
        str(row["pairs"] if by_pairs else row["distance"]).replace(" to ", "–") for row in rows
    ]
    panel.set_xticks(places, names, fontsize=7)
    panel.set_ylim(-0.03, 1.03)
    panel.set_title(title)
    panel.set_xlabel("pairs" if by_pairs else "tokens between value and answer")
    return drawn
