"""What all pictures share: style, colours, and writing PNG, SVG, PDF and CSV.

matplotlib without pyplot: no window, no global state, the same bytes on every run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlm.base.files import atomic_path, write_text
from mlm.base.names import CACHE

WIDTHS = {"column": 3.3, "text": 6.9}
"""Inches: one column of a paper with two, and its text."""
FORMATS = ("png", "svg", "pdf")
DENSE, DASHED, DOTTED = (0, (3, 1)), (0, (5, 1.5)), (0, (1, 1.2))
DASH_DOT, LONG = (0, (5, 1.2, 1, 1.2)), (0, (8, 1.5))

RULE_STYLES: dict[str, tuple[str, Any]] = {
    "static": ("#000000", "-"),
    "sgd": ("#7A4A00", DOTTED),
    "momentum": ("#7A4A00", DASH_DOT),
    "rms": ("#117733", DASHED),
    "adam": ("#117733", DOTTED),
    "tensor_steps": ("#555555", DASHED),
    "weight_steps": ("#555555", DASH_DOT),
    "two_levels": ("#0B5CAD", "-"),
    "three_levels": ("#B8400A", "-"),
    "unit_steps": ("#B8400A", DENSE),
    "four_levels": ("#882255", "-"),
    "surprise": ("#332288", DASHED),
    "adaptive": ("#332288", DOTTED),
    "mlp": ("#00706B", "-"),
    "lstm": ("#00706B", DASHED),
}
"""Colour and line of every rule in every picture. Colours stand out from white by 4.5 to 1 and
more, and differ for colour-blind readers (after Paul Tol's); lines repeat the distinction."""
_OTHER_STYLES = (("#332288", LONG), ("#7A4A00", LONG), ("#00706B", LONG), ("#555555", LONG))


_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mlm",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "figure.dpi": 100,
    "savefig.dpi": 300,
}


@dataclass(frozen=True)
class Look:
    """How pictures are drawn and written."""

    width: float = WIDTHS["text"]
    """Inches."""
    formats: tuple[str, ...] = FORMATS

    @property
    def narrow(self) -> bool:
        """Whether panels stand below each other rather than side by side."""
        return self.width < 5


PAPER = Look()


@contextlib.contextmanager
def project_style() -> Iterator[None]:
    """A context in which matplotlib draws in the project's style, in silence about signs that its
    font lacks (emoji, rare scripts): a box stands for them."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def rule_style(rule: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the line colour and style of a rule; unknown rules take turns in `others`.

    With a neural cache on top, a rule has its own colour and a dotted line.
    """
    base = rule.removesuffix(CACHE)
    place = list(others).index(rule) if rule in others else 0
    colour, line = RULE_STYLES.get(base, _OTHER_STYLES[place % len(_OTHER_STYLES)])
    return {"color": colour, "linestyle": line if rule == base else DOTTED}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, `width` x `height` inches, in the project's style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(
    figure: Figure, stem: Path, rows: Sequence[dict[str, Any]], formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `stem` in each of `formats`, and the drawn numbers as .csv, each atomically; return
    the paths. The same picture gives the same bytes."""
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in (*formats, "csv")]
    for path, ending in zip(paths, formats, strict=False):
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=ending, metadata=undated[ending])
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(paths[-1], text.getvalue())
    return paths


def drawable(text: str) -> str:
    """Return `text` with a box for control characters, which no font draws and XML forbids."""
    return "".join("\N{WHITE SQUARE}" if unicodedata.category(c) == "Cc" else c for c in text)


def short_title(title: str, width: int = 34) -> str:
    """Return `title` for drawing, cut with an ellipsis to at most `width` characters."""
    title = drawable(title)
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"
