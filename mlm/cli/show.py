"""Draw a run's pictures from its folder: mlm show runs/pydocs"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlm.base.errors import UserError
from mlm.base.terminal import stands_out
from mlm.settings.checks import check_options


@dataclass(frozen=True)
class Options:
    """Draw a run's pictures from its folder: `figures/` (PNG, SVG, PDF and the numbers as CSV)
    and `words.html`, a page that shows every word coloured by what a rule gains on it."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, such as runs/pydocs."""
    split: str | None = None
    """The split to show; by default `valid`, else the first that was evaluated."""
    articles: int = 8
    """How many successive articles figure 2 shows."""
    first: int = 1
    """The number of figure 2's first article, counted from 1 as on the page."""
    protocol: Literal["article", "stream"] | None = None
    """The protocol to show; by default `stream` in figure 2, `article` in pictures of words."""
    passage: tuple[int, int] | None = None
    """The numbers of an article and of a word in it, counted from 1 as on the page: draw the text
    from there, for papers."""
    rule: str | None = None
    """The rule to show in figure 2, in pictures of words and in the terminal; by default the best
    learned one."""
    against: str | None = None
    """The rule to compare it with; by default static."""
    only: tuple[str, ...] = ()
    """The pictures to draw: figure2, gain_by_occurrence, gain_by_position, words, training,
    page; by default all."""
    width: Literal["column", "text"] = "text"
    """For a column of a paper (3.3 inches) or its whole text (6.9 inches), in 8 points."""
    format: tuple[Literal["png", "svg", "pdf"], ...] = ("png", "svg", "pdf")
    """The files of every picture, beside its numbers as CSV."""
    page_words: int = 300_000
    """How many words the page holds at most."""
    terminal: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draw nothing, but show the passage here, every word in its colour."""


def main() -> None:
    """Parse the command line; draw and print one path a line, or show a passage."""
    options = tyro.cli(Options)
    check_options(options)
    if options.terminal:
        print(_passage(options))
        return
    from mlm.page.folder import draw_run
    from mlm.report.drawing import WIDTHS, Look

    paths = draw_run(
        options.run,
        options.split,
        options.articles,
        first=options.first,
        protocol=options.protocol,
        passage=options.passage,
        pair=(options.rule, options.against),
        only=options.only,
        look=Look(WIDTHS[options.width], options.format),
        page_words=options.page_words,
    )
    for path in paths:
        print(path)


def _passage(options: Options) -> str:
    """The passage asked for, or the beginning of the first article that is shown."""
    from mlm.page.passage import passage_in_colours
    from mlm.report.losses import LossTable, compared

    table = LossTable.load(options.run / "losses.parquet", options.split)
    present = table.compared_protocols()
    protocol = options.protocol or present[0]
    if protocol not in present:
        raise UserError(
            f"--protocol {protocol}: it was not measured on split {table.split!r}; present: "
            f"{', '.join(present)}"
        )
    number, word = options.passage or (options.first, 1)
    return passage_in_colours(
        table,
        table.numbered(number),
        word - 1,
        pair=compared(table, protocol, (options.rule, options.against)),
        protocol=protocol,
        width=min(100, shutil.get_terminal_size().columns),
        colours=stands_out(sys.stdout),
    )
