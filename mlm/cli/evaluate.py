"""Score a trained run: mlm evaluate runs/pydocs [--split test] [--corpus TEXT] [--help]"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from mlm.base.errors import UserError
from mlm.cli.flags import (
    Setting,
    help_text,
    name_of_script,
    parse,
    settings_of,
    today,
    wants_help,
)
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.flags import flag, leaves, replaced

HELP = """\
usage: {script} RUN [FLAGS]

Score the rules of a run folder: word perplexity, bits per byte and nats gained over static.
Hand-made rules are tuned on validation, with the budget that every rule has. Results go to
evaluation.json, evaluation.md and losses.parquet in the run folder; those of another corpus to a
folder on-<corpus> in it. A file or a folder of plain text is scored whole, one article per file.

examples:
  {script} runs/pydocs --split test
  {script} runs/pydocs --corpus path/to/text --rules static rms three_levels

Defaults are in brackets; those of RUN count instead, but the split is valid unless it is named.
"""


@dataclass(frozen=True)
class Options:
    """What only this script asks for."""

    run: Path = Path("runs/pydocs")
    """The run folder."""
    corpus: str | None = None
    """The text to score; by default the run's own."""
    draw: bool = True
    """Draw the pictures afterwards."""


def _settings(config: Config) -> list[Setting]:
    """What this script asks for: its own options, and what it shares with training."""
    shared = ("device", "threads", *(p for p in leaves(config) if p.startswith("evaluation.")))
    return [*settings_of(Options()), *(s for s in settings_of(config) if s.path in shared)]


def main() -> None:
    """Parse the command line, score, print the table."""
    from mlm.store.run_folder import RunFolder

    script, words = name_of_script(), today(sys.argv[1:])
    for path in leaves(Config().evaluation):
        name = flag(f"evaluation.{path}")
        bare = "--" + path.replace("_", "-")
        if bare in words and bare != name:
            raise UserError(f"{bare} is called {name}, as in train.py")
    if wants_help(words):
        head = HELP.format(script=script)
        print(help_text(head, _settings(Config())[1:], "--help-all" in words))
        return
    run = parse(script, words, _settings(Config()), positional=("run",))["run"]
    # The run's own settings, but test is read only when this command asks for it.
    config = RunFolder(run).load_config()
    config = replaced(config, {"device": "auto", "evaluation.split": "valid"})
    found = parse(script, words, _settings(config), positional=("run",))
    options = {field.name: found.pop(field.name) for field in dataclasses.fields(Options)}
    config = replaced(config, {**found, "out": run, "stages": ("evaluate",)})
    from mlm.runs.evaluate import evaluate_run

    evaluate_run(validate(config), options["corpus"], options["draw"])
