"""Score a trained run: mlm evaluate runs/pydocs [--split test] [--corpus TEXT] [--help]"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from mlm.base.errors import UserError, command_of, going_on
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
from mlm.store.released import find_model
from mlm.store.run_folder import RunFolder
from mlm.text.corpora import NAMED

HELP = """\
usage: {script} RUN [FLAGS]

Score the rules of a run folder: word perplexity, bits per byte and nats gained over static.
Hand-made rules are tuned on validation, with the budget that every rule has. Results go to
evaluation.json, evaluation.md and losses.parquet in the run folder; those of another corpus to a
folder on-<corpus> in it. A file or a folder of plain text is scored whole, one article per file.
RUN may also be a released model or one on the hub (user/name), which are only read: results of
wikipedia-small go to runs/wikipedia-small.

examples:
  {script} runs/pydocs --split test
  {script} runs/pydocs --corpus path/to/text --rules static rms three_levels
  {script} wikipedia-small --corpus path/to/text
  {script} runs/pydocs --split test --audit

Defaults are in brackets; those of RUN count instead, but the split is valid unless it is named.
"""


@dataclass(frozen=True)
class Options:
    """What only this script asks for."""

    run: Path = Path("runs/pydocs")
    """The run folder, or the name of a released model or of one on the hub."""
    corpus: str | None = None
    """The text to score; by default the run's own."""
    out: Path | None = None
    """Where results go; by default the run folder, or runs/NAME of a released model."""
    draw: bool = True
    """Draw the pictures afterwards."""
    audit: bool = False
    """Score nothing, but check what the numbers rest on; exit code 1 if a check fails."""


def _settings(config: Config) -> list[Setting]:
    """What this script asks for: its own options, and what it shares with training."""
    shared = (
        "device",
        "threads",
        "memory_gb",
        "text.data_dir",
        *(p for p in leaves(config) if p.startswith("evaluation.")),
    )
    return [*settings_of(Options()), *(s for s in settings_of(config) if s.path in shared)]


def _results(run: Path, folder: RunFolder, out: Path | None) -> Path | None:
    """Where the results go; None = the run folder.

    Raises:
        UserError: it is another run's folder, or within a released model.
    """
    if not folder.released:
        if out is not None and out.resolve() == folder.path.resolve():
            return None
    elif out is None:
        out = Path("runs") / run.resolve().name
    if out is None:
        return None
    inside = folder.released and out.resolve().is_relative_to(folder.path.resolve())
    if inside or (out / "config.json").exists():
        what = "within that model, which is only read" if inside else "a run folder of its own"
        raise UserError(
            f"results of {run} would go to {out}, {what}; name another folder with --out"
        )
    return out


def main() -> None:
    """Parse the command line, score, print the table."""
    script, words = name_of_script(), today(sys.argv[1:])
    for path in leaves(Config().evaluation):
        name = flag(f"evaluation.{path}")
        bare = "--" + path.replace("_", "-")
        if bare in words and bare != name:
            raise UserError(f"{bare} is called {name}, as in `{command_of('train')}`")
    if wants_help(words):
        head = HELP.format(script=script)
        print(help_text(head, _settings(Config())[1:], "--help-all" in words))
        return
    run = parse(script, words, _settings(Config()), positional=("run",))["run"]
    folder = RunFolder(find_model(run))
    # The run's own settings, but test is read only when this command asks for it.
    config = folder.load_config()
    config = replaced(config, {"device": "auto", "evaluation.split": "valid"})
    found = parse(script, words, _settings(config), positional=("run",))
    options = {field.name: found.pop(field.name) for field in dataclasses.fields(Options)}
    config = replaced(config, {**found, "out": folder.path, "stages": ("evaluate",)})
    corpus, results = options["corpus"], _results(run, folder, options["out"])
    if folder.released and corpus is None and config.corpus not in NAMED:
        raise UserError(
            f"{run}: the text {config.corpus} that it was trained with is not a part of it; name "
            "a text to score with --corpus"
        )
    if options["audit"]:
        from mlm.cli.audit import audit_run

        audit_run(str(run), validate(config), corpus)
        return
    from mlm.stages.evaluate import evaluate_run

    with going_on(lambda: "the same command again; rules that are scored are not read again"):
        evaluate_run(validate(config), corpus, options["draw"], results)
