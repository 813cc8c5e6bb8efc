"""Copy what the world may see of a run or a benchmark into results/: no weights, no text.

    python -m benchmarks.publish runs/wikipedia results/wikipedia
    python -m benchmarks.publish runs/benchmarks/peers results/engine

Of a run: settings, metrics, tuning, tables and the pictures that hold no running text (Figure 2,
gain by position, training curves); `words.html`, the pictures of words, word losses and checkpoints
stay behind. Of a benchmark's `--out`: tables and pictures, also those of the corpora in folders of
their own. Files of the same names are replaced. `python -m benchmarks.readme` then writes the
tables of the pages anew.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.output import MADE
from mlm.base.errors import UserError, run_cli
from mlm.base.files import atomic_path

PICTURES = ("figures/figure2*", "figures/gain_by_*")
RUN = (
    "config.json",
    "metrics.jsonl",
    "tuning.json",
    "evaluation.json",
    "evaluation.md",
    *PICTURES,
    "figures/training*",
)
"""Files of a run folder."""
BENCHMARK = (
    *(f"*.{ending}" for ending in ("json", "csv", "png", "svg")),
    *(f"*/{file}" for file in ("*.json", "evaluation.md", *PICTURES)),
)
"""Files of a benchmark's folder."""


@dataclass(frozen=True)
class Options:
    """Publish the tables and pictures of a run or a benchmark."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run folder, or what a benchmark wrote: its --out."""
    to: Annotated[Path, tyro.conf.Positional]
    """Where its results go, such as results/wikipedia."""


def published(source: Path) -> list[Path]:
    """The files of `source` that may be shown.

    Raises:
        UserError: it is a run without an evaluation, holds run folders, or holds nothing to show.
    """
    is_run = (source / "config.json").exists()
    if is_run and not (source / "evaluation.json").exists():
        raise UserError(f"{source} holds no evaluation.json; run evaluate.py on it first")
    if not is_run and (runs := sorted(source.glob("*/config.json"))):
        raise UserError(
            f"{source} holds run folders; publish one of them, such as {runs[0].parent}"
        )
    patterns = RUN if is_run else BENCHMARK
    every = {path for pattern in patterns for path in source.glob(pattern)}
    found = sorted(path for path in every if path.name != MADE)
    if not found:
        raise UserError(f"{source} holds neither a run nor what a benchmark wrote")
    return found


def main() -> None:
    """Copy and print the paths."""
    options = tyro.cli(Options, description=__doc__)
    for path in published(options.source):
        target = options.to / path.relative_to(options.source)
        with atomic_path(target) as temporary:
            shutil.copyfile(path, temporary)
        print(target)


if __name__ == "__main__":
    run_cli(main)
