"""What all pictures share: style, colours, and writing PNG, SVG and CSV.

matplotlib without pyplot: no window, no global state, the same bytes on every run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlm.base.files import atomic_path, write_text

#: Okabe and Ito's palette, safe for colour-blind readers; line styles repeat the distinction.
RULE_STYLES = {
    "static": ("#000000", "-"),
    "sgd": ("#E69F00", (0, (1, 1.2))),
    "rms": ("#009E73", (0, (4, 1.5))),
    "two_levels": ("#0072B2", "-"),
    "three_levels": ("#D55E00", "-"),
    "four_levels": ("#882255", "-"),
}


_OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#999999", "#F0E442")


_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mlm",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


@contextlib.contextmanager
def project_style() -> Iterator[None]:
    """A context in which matplotlib draws in the project's style, in silence about signs that its
    font lacks (emoji, rare scripts): a box stands for them."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def rule_style(rule: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the line colour and style of a rule; unknown rules take turns in `others`."""
    if rule in RULE_STYLES:
        colour, line = RULE_STYLES[rule]
        return {"color": colour, "linestyle": line}
    place = list(others).index(rule) if rule in others else 0
    return {"color": _OTHER_COLOURS[place % len(_OTHER_COLOURS)], "linestyle": (0, (6, 1, 1, 1))}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, `width` x `height` inches, in the project's style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, stem: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write `stem`.png, .svg and the drawn numbers as .csv, each atomically; return the paths."""
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg", ".csv")]
    with atomic_path(paths[0]) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    with atomic_path(paths[1]) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(paths[2], text.getvalue())
    return paths


def drawable(text: str) -> str:
    """Return `text` with a box for control characters, which no font draws and XML forbids."""
    return "".join("\N{WHITE SQUARE}" if unicodedata.category(c) == "Cc" else c for c in text)


def short_title(title: str, width: int = 34) -> str:
    """Return `title` for drawing, cut with an ellipsis to at most `width` characters."""
    title = drawable(title)
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"
