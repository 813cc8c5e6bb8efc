"""Train a language model that learns while it reads: mlm train [--corpus ...] [--help]"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import tyro

from mlm.base.errors import UserError
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.presets import PRESETS


def _value(flag: str) -> str | None:
    """The value of a flag on the command line, before it is parsed properly."""
    for word, following in itertools.pairwise([*sys.argv[1:], ""]):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return None


def _defaults() -> Config:
    """The preset, or the run folder's own settings when an existing run goes on; of a preset named
    as well, what comes after stage 1."""
    from mlm.runs.run import run_path
    from mlm.store.run_folder import RunFolder

    named = _value("--preset")
    if named is not None and named not in PRESETS:
        raise UserError(f"--preset {named}: unknown; choose from {', '.join(PRESETS)}")
    preset = PRESETS[named or "pydocs"]
    out, corpus = _value("--out"), _value("--corpus") or "pydocs"
    path = Path(out) if out else run_path(Config(corpus=corpus))
    goes_on = "--resume" in sys.argv or (_value("--stages") or "lm") != "lm"
    if not (goes_on and (path / "config.json").exists()):
        return preset
    found = dataclasses.replace(RunFolder(path).load_config(), resume=False, overwrite=False)
    if "--resume" in sys.argv:
        return found
    if named is not None:  # its rule on the language model that is there
        found = dataclasses.replace(
            found, adapt=preset.adapt, meta=preset.meta, evaluation=preset.evaluation
        )
    # Test is read when this command asks for it, not because an earlier one did.
    return dataclasses.replace(
        found, evaluation=dataclasses.replace(found.evaluation, split="valid")
    )


def main() -> None:
    """Parse the command line, then run the stages."""
    if {"-h", "--help"} & set(sys.argv):
        config = tyro.cli(Config, description=__doc__)
    config = validate(tyro.cli(Config, default=_defaults(), description=__doc__))
    from mlm.runs.stages import run_stages

    run_stages(config)
