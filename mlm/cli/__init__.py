"""The command `mlm`: one subcommand per module of this package.

Nothing heavy is imported before the subcommand is known, so that `mlm --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from mlm.base.errors import run_cli
from mlm.base.processes import refuse_several

__all__ = ["COMMANDS", "DIVIDED", "Command", "commands_text", "main"]


class Command(NamedTuple):
    """A subcommand as `mlm --help` shows it; `mlm.cli.<name>` has its `main`."""

    name: str
    summary: str
    example: str


COMMANDS = (
    Command(
        "train",
        "train, adapt, score and draw; without arguments on a built-in corpus",
        "mlm train --corpus path/to/text --out runs/mine",
    ),
    Command(
        "evaluate",
        "score the rules of a run folder: perplexity, bits per byte, nats gained",
        "mlm evaluate runs/pydocs --split test",
    ),
    Command(
        "score",
        "score any text, word by word, with a model that learns while it reads",
        "mlm score README.md",
    ),
    Command(
        "audit",
        "check a model's promises on a text: causal, normalised, every word counted",
        "mlm audit runs/pydocs",
    ),
    Command(
        "show",
        "draw the pictures of a run folder and its page of coloured words",
        "mlm show runs/pydocs",
    ),
    Command(
        "export",
        "write a run folder as a released model: compact, checked, only read",
        "mlm export runs/pydocs models/mine --rules static rms three_levels",
    ),
)
DIVIDED = ("train", "evaluate")
"""Those whose work several processes share."""
_NAMES = ", ".join(command.name for command in COMMANDS)


def commands_text() -> str:
    """What `mlm --help` prints."""
    lines = [
        "usage: mlm COMMAND [FLAGS]",
        "",
        "A language model that learns while it reads: an LSTM whose weights are a memory.",
        "",
        "commands:",
    ]
    for command in COMMANDS:
        lines += [f"  {command.name:<10}{command.summary}", f"{'':12}{command.example}"]
    lines += [
        "",
        "mlm COMMAND --help lists the flags of a command; mlm --version prints the version.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run `mlm COMMAND ...`; exit with 2 when there is no such command."""
    words = sys.argv[1:]
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        run_cli(lambda: print(commands_text()))
        return
    if first == "--version":
        from mlm import __version__

        run_cli(lambda: print(f"mlm {__version__}"))
        return
    if first not in [command.name for command in COMMANDS]:
        print(f"error: mlm {first}: no such command; choose from {_NAMES}", file=sys.stderr)
        raise SystemExit(2)
    if first not in DIVIDED:
        run_cli(lambda: refuse_several(f"mlm {first}"))
    sys.argv = [f"mlm {first}", *words[1:]]  # a subcommand reads its flags there, as a script does
    run_cli(importlib.import_module(f"mlm.cli.{first}").main)
