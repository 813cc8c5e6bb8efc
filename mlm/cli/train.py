"""Train a language model that learns while it reads: mlm train [--corpus ...] [--help]"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from mlm.base.errors import UserError, going_on
from mlm.base.processes import several_processes
from mlm.cli.flags import (
    help_text,
    name_of_script,
    parse,
    settings_of,
    today,
    values_of,
    wants_help,
    without_preset,
)
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.flags import replaced
from mlm.settings.presets import RULE_SETTINGS, SIZES, settings, with_rule

HELP = """\
usage: {script} [FLAGS]

Train a language model that learns while it reads, score it, draw it.

examples:
  {script}                                          # built-in text, minutes
  {script} --corpus path/to/text --size small       # own text, one or two hours
  {script} --rule best --stages meta evaluate draw --out runs/pydocs   # then, the best rule
  {script} --out runs/pydocs --resume               # continue what was interrupted

Defaults are in brackets: those of --size {size} --rule {rule}.
"""


def _named(words: Sequence[str], name: str, known: Sequence[str]) -> str | None:
    """The value of --size or --rule; None = it is not on the command line."""
    values = values_of(words, name)
    if values is None:
        return None
    if len(values) != 1 or values[0] not in known:
        raise UserError(f"{name} {' '.join(values)}: unknown; choose from {', '.join(known)}")
    return values[0]


def _defaults(words: Sequence[str]) -> Config:
    """The settings of size and rule, or the run folder's own where an existing run goes on.

    Raises:
        UserError: an unknown size or rule, or a size that is not the run's.
    """
    from mlm.runs.run import run_path
    from mlm.store.run_folder import RunFolder

    size, rule = _named(words, "--size", [*SIZES]), _named(words, "--rule", [*RULE_SETTINGS])
    fresh = settings(size or "tiny", rule or "default")
    out, corpus = ("".join(values_of(words, name) or ()) for name in ("--out", "--corpus"))
    path = Path(out) if out else run_path(Config(corpus=corpus or fresh.corpus))
    resume = "--resume" in words
    goes_on = resume or "lm" not in (values_of(words, "--stages") or ("lm",))
    if not (goes_on and (path / "config.json").exists()):
        return fresh
    found = dataclasses.replace(RunFolder(path).load_config(), resume=False, overwrite=False)
    if resume:  # another size or rule is refused, as all other settings are
        return found
    if rule is not None:  # for the language model that is there
        found = with_rule(found, rule)
    # Test is read when this command asks for it, not because an earlier one did.
    return replaced(found, {"evaluation.split": "valid"})


def main() -> None:
    """Parse the command line, then run the stages."""
    script, words = name_of_script(), without_preset(today(sys.argv[1:]))
    if wants_help(words):
        config = _defaults([w for w in words if w != "--resume"])
        head = HELP.format(script=script, size=config.size, rule=config.rule)
        print(help_text(head, settings_of(config), "--help-all" in words))
        return
    default = _defaults(words)
    config = validate(replaced(default, parse(script, words, settings_of(default))))
    from mlm.runs.run import run_path
    from mlm.stages.order import run_stages

    def again() -> str:
        path = run_path(config)
        begun = (path / "config.json").exists()
        return f"{script} --out {path} --resume" if begun else "the same command again"

    with going_on(again), several_processes(config.device):
        run_stages(config)
