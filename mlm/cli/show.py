"""Draw a run's pictures from its folder: mlm show runs/pydocs"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlm.settings.checks import check_options


@dataclass(frozen=True)
class Options:
    """Draw a run's pictures from its folder: `figures/` (PNG, SVG and the numbers as CSV) and
    `words.html`, a page that shows every word coloured by its loss difference."""

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


def main() -> None:
    """Parse the command line, draw, and print one path a line."""
    options = tyro.cli(Options)
    check_options(options)
    from mlm.report.plots import draw_all

    paths = draw_all(
        options.run,
        options.split,
        options.articles,
        first=options.first,
        protocol=options.protocol,
        passage=options.passage,
    )
    for path in paths:
        print(path)
