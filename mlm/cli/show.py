"""Draw a run's pictures from its folder: mlm show runs/pydocs"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Draw a run's pictures from its folder: `figures/` (PNG, SVG, PDF and the numbers as CSV)
    and `words.html`, a page that shows every word coloured by its loss difference."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, such as runs/pydocs."""
    split: str | None = None
    """The split to show; by default `valid`, else the first that was evaluated."""
    articles: int = 8
    """How many successive articles figure 2 shows."""
    first: int = 0
    """The place of figure 2's first article in the split, counted from 0."""
    protocol: Literal["article", "stream"] | None = None
    """The protocol to show; by default `stream` in figure 2, `article` in pictures of words."""
    passage: tuple[int, int] | None = None
    """An article's index and a word's position: draw the text from there, for papers."""
    rule: str | None = None
    """The rule to show in figure 2 and in pictures of words; by default the best learned one."""
    against: str | None = None
    """The rule to compare it with; by default static."""
    only: tuple[str, ...] = ()
    """The pictures to draw: figure2, gain_by_position, words, training, page; by default all."""
    width: Literal["column", "text"] = "text"
    """For a column of a paper (3.3 inches) or its whole text (6.9 inches), in 8 points."""
    format: tuple[Literal["png", "svg", "pdf"], ...] = ("png", "svg", "pdf")
    """The files of every picture, beside its numbers as CSV."""


def main() -> None:
    """Parse the command line, draw, and print one path a line."""
    options = tyro.cli(Options)
    from mlm.report.drawing import WIDTHS, Look
    from mlm.report.plots import draw_all

    paths = draw_all(
        options.run,
        options.split,
        options.articles,
        first=options.first,
        protocol=options.protocol,
        passage=options.passage,
        pair=(options.rule, options.against),
        only=options.only,
        look=Look(WIDTHS[options.width], options.format),
    )
    for path in paths:
        print(path)
