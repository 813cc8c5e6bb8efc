"""The picture of gain against cost: points, their Pareto front, and the lines to beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from mlm.report.drawing import new_figure, project_style, save_figure

CHEAP, SHARE = 1.3, 0.8
"""The dashed lines: time over static, and share of the best gain."""
MARKS = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"))
"""Colour (Okabe and Ito) and shape of each M in turn."""
COLUMNS = ("dynamic", "rank", "segment", "rms", "learned", "time over static", "bytes per lane")
_PLACES = [(x, y) for y in (6, -6, 0, 14, -14, 22, -22) for x in (5, -5)]
"""Where a label may stand beside its point, in points, best first."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, gain) that no other beats in both, cheapest first."""
    front: list[int] = []
    for k in sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1])):
        if not front or points[k][1] > points[front[-1]][1]:
            front.append(k)
    return front


def label(row: dict[str, Any]) -> str:
    """A choice in few letters."""
    rank = f" r{row['rank']}" if row["rank"] else ""
    return row["dynamic"].replace(",", " + ") + rank


def draw(rows: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """Draw the rows whose training did not diverge as `stem`.png and .svg beside `stem`.csv."""
    rows = [row for row in rows if row["learned"] is not None]
    points = [(row["time over static"], row["learned"]) for row in rows]
    with project_style():
        figure = new_figure(8.4, 5.4)
        panel = figure.subplots()
        for k, segment in enumerate(sorted({row["segment"] for row in rows})):
            own = [p for p, row in zip(points, rows, strict=True) if row["segment"] == segment]
            colour, marker = MARKS[k % len(MARKS)]
            panel.scatter(*zip(*own, strict=True), c=colour, marker=marker, label=f"M = {segment}")
        front = [points[k] for k in pareto_front(points)]
        if front:
            panel.step(
                *zip(*front, strict=True), where="post", color="#999999", zorder=0, label="front"
            )
            _lines(panel, max(gain for _, gain in points))
        _axes(panel)
        panel.legend(loc="lower right", fontsize=8)
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        figure.draw_without_rendering()
        _labels(panel, points, [label(row) for row in rows], canvas)
        return save_figure(figure, stem, [{c: row[c] for c in COLUMNS} for row in rows])


def _lines(panel: Axes, best: float) -> None:
    """The cost and the gain that count as good, dashed."""
    dashed: dict[str, Any] = {"color": "#000000", "linewidth": 0.8, "linestyle": (0, (4, 3))}
    panel.axvline(CHEAP, **dashed)
    panel.axhline(SHARE * best, **dashed)
    note: dict[str, Any] = {"fontsize": 7.5, "color": "#555555", "textcoords": "offset points"}
    panel.annotate(
        f"{CHEAP:g}×", (CHEAP, 0), xycoords=("data", "axes fraction"), xytext=(2, 3), **note
    )
    panel.annotate(
        f"{SHARE:.0%} of the best gain",
        (0, SHARE * best),
        xycoords=("axes fraction", "data"),
        xytext=(3, 3),
        **note,
    )


def _axes(panel: Axes) -> None:
    """A logarithmic axis of times, room for labels on both sides."""
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 1.0) / 1.1, high * 1.6)
    panel.margins(y=0.12)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("scoring time over static scoring")
    panel.set_ylabel("nats per word gained over static")


def _labels(
    panel: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    canvas: FigureCanvasAgg,
) -> None:
    """Name every point, in the first place beside it that is still free and in the panel."""
    renderer = canvas.get_renderer()
    pixels = panel.transData.transform(points)
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in pixels]
    taken += [note.get_window_extent(renderer) for note in panel.texts]
    panel_box = panel.get_window_extent(renderer)
    for point, text in zip(points, texts, strict=True):
        for dx, dy in _PLACES:
            note = panel.annotate(
                text,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                va="center",
                fontsize=6.5,
                bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.4},
            )
            box = note.get_window_extent(renderer)
            free = panel_box.x0 <= box.x0 and not box.count_overlaps(taken)
            if free or (dx, dy) == _PLACES[-1]:
                taken.append(box)
                break
            note.remove()
