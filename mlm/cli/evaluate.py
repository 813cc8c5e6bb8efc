"""Score a trained run: mlm evaluate runs/pydocs [--split test] [--corpus TEXT] [--help]"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlm.settings.checks import validate
from mlm.settings.sections import EvaluationConfig


@dataclass(frozen=True)
class Options:
    """Word perplexity, bits per byte and nats gained over static, for every rule and protocol.

    The hand-made rules are tuned on validation with the budget every rule has; results go to
    evaluation.json, evaluation.md and losses.parquet in the run folder (of another corpus, to a
    folder on-<corpus> in it).
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, such as runs/pydocs."""
    corpus: str | None = None
    """Text to score; default: the run's own corpus."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA if there is one."""
    draw: bool = True
    """Draw the pictures afterwards."""
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=EvaluationConfig
    )


def main() -> None:
    """Parse the command line, score, print the table."""
    from mlm.store.run_folder import RunFolder

    named = tyro.cli(Options, default=Options(Path("runs/pydocs"))).run
    config = RunFolder(named).load_config()
    # The run's own settings, but test is read only when this command asks for it.
    evaluation = dataclasses.replace(config.evaluation, split="valid")
    options = tyro.cli(Options, default=Options(named, evaluation=evaluation))
    config = validate(
        dataclasses.replace(
            config,
            evaluation=options.evaluation,
            device=options.device,
            out=options.run,
            stages=("evaluate",),
        )
    )
    from mlm.runs.evaluate import evaluate_run

    evaluate_run(config, options.corpus, options.draw)
