"""Copy what a run may show the world from its folder into results/: no weights, no text.

    python -m benchmarks.publish runs/wikipedia results/wikipedia

Copies settings, metrics, tuning, tables and the pictures that hold no running text (Figure 2, gain
by position, training curves); `words.html`, the pictures of words, word losses and checkpoints
stay behind.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mlm.errors import UserError, run_cli
from mlm.files import atomic_path

FILES = (
    "config.json",
    "metrics.jsonl",
    "tuning.json",
    "evaluation.json",
    "evaluation.md",
    "benchmarks/*.json",
    "figures/figure2*",
    "figures/gain_by_position*",
    "figures/training*",
)


@dataclass(frozen=True)
class Options:
    """Publish a run's tables and pictures."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    to: Annotated[Path, tyro.conf.Positional]
    """Where its results go, such as results/wikipedia."""


def main() -> None:
    """Copy and print the paths."""
    options = tyro.cli(Options, description=__doc__)
    found = sorted(path for pattern in FILES for path in options.run.glob(pattern))
    if not (options.run / "evaluation.json").exists():
        raise UserError(f"{options.run} holds no evaluation.json; run evaluate.py on it first")
    for path in found:
        target = options.to / path.relative_to(options.run)
        with atomic_path(target) as temporary:
            shutil.copyfile(path, temporary)
        print(target)


if __name__ == "__main__":
    run_cli(main)
