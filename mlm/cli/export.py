"""Write a run folder as a released model: mlm export runs/pydocs models/mine"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mlm.cli.flags import name_of_script
from mlm.store.card import Card


@dataclass(frozen=True)
class Options:
    """Write a run folder as a released model: what reading needs and nothing else, in half the
    space, with the checksum of every file and a model card (README.md)."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, such as runs/pydocs; its stage 2 must be done."""
    folder: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist, or be empty."""
    rules: tuple[str, ...] = ()
    """The rules to keep; by default all that are trained or tuned."""
    title: str = ""
    """Heading of the model card; by default the folder's name."""
    text_attribution: str = ""
    """Where the training text comes from, and whom its licence asks to name."""
    licence: str = Card.licence
    """Of the weights, as the hub writes it, such as apache-2.0 or cc-by-sa-4.0."""
    language: str = Card.language
    """Of the text, as the hub writes it."""


def main() -> None:
    """Parse the command line, export, print the path and the size."""
    options = tyro.cli(Options, prog=name_of_script())
    from mlm.reader.export import export

    said = Card(
        options.title or options.folder.resolve().name,
        options.text_attribution,
        options.licence,
        options.language,
    )
    folder = export(options.run, options.folder, options.rules, said)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
