"""What a person at the terminal sees: lines, notes, progress bars, and what stands out.

Lines about the work go to stderr, results to stdout. Where stderr is no terminal, a bar is at most
one line a minute.
"""

from __future__ import annotations

import os
import sys
from typing import IO, TYPE_CHECKING, Any

from mlm.base.errors import plain

if TYPE_CHECKING:
    from tqdm import tqdm

INDENT = " " * 6
"""Of what belongs to a stage: the width of `[1/4] `."""
LINE_SECONDS = 60
"""Between two lines of a bar where there is no terminal."""


def say(text: str) -> None:
    """A line for the person at the terminal, above the bars that are there."""
    from tqdm import tqdm  # here: `mlm --help` answers at once

    tqdm.write(plain(text), file=sys.stderr)


def detail(text: str) -> None:
    """A line about the stage that is going on."""
    say(INDENT + text)


_NOTED: set[str] = set()


def note(text: str) -> None:
    """A note for the person at the terminal, once a process."""
    if text not in _NOTED:
        _NOTED.add(text)
        say(f"note: {text}")


def stands_out(stream: IO[str]) -> bool:
    """Whether colours and bold letters are shown there: a terminal that has them, and no NO_COLOR
    (no-color.org)."""
    able = os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return able and stream.isatty()


def progress_bar(
    title: str, total: int | None, *, unit: str = "", initial: int = 0, quiet: bool = False
) -> tqdm[Any]:
    """A bar on stderr that is gone when the work is done; `unit` is shown where `total` is unknown.

    Its `set_postfix_str(..., refresh=False)`, before `update`, says more.
    """
    from tqdm import tqdm

    if total is None:
        form = f"{INDENT}{{desc}}: {{n_fmt}} {unit}, {{rate_fmt}}"
    elif sys.stderr.isatty():
        form = f"{INDENT}{{desc}} {{percentage:3.0f}} % |{{bar:16}}| {{remaining}} left{{postfix}}"
    else:
        form = f"{INDENT}{{desc}}: {{percentage:.0f}} %, {{remaining}} left{{postfix}}"
    how: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        seconds = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "maxinterval": 1e9}
        how = {"file": _Lines(sys.stderr), **seconds}
    return tqdm(
        total=total,
        initial=initial,
        desc=plain(title),
        bar_format=form,
        unit=f" {unit}",
        unit_scale=True,
        leave=False,
        smoothing=0.0,
        disable=quiet,
        **how,
    )


class _Lines:
    """A stream on which every state of a bar is a line of its own."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        """Write a state, not what would wipe one away."""
        line = text.strip("\r\n").rstrip()
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
