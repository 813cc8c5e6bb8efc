"""How much text does the Fisher need? Dynamic evaluation and its Fisher, on one language model.

    python -m benchmarks.fisher runs/ordinary

A word that the Fisher's text does not hold has a gradient of almost nothing there, so Krause's rule
takes steps at it that are limited by eps alone. For every number of words and every share of the
prior (`--adapt.fisher-prior`), RMS dynamic evaluation is tuned on the validation articles that
tuning reads. Writes fisher.json. Letters: W words, P priors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.output import HOME
from benchmarks.rows import language_model
from benchmarks.timing import record
from mlm.base.errors import run_cli
from mlm.kernels.switches import use_threads
from mlm.models.base import AdaptationBase
from mlm.models.extension import Making
from mlm.rules.hand_made import RMS
from mlm.runs.base import new_base
from mlm.runs.run import open_run
from mlm.store.models import load_lm
from mlm.training.fisher import smooth_fisher
from mlm.training.judge import static_of
from mlm.training.tuning import TuneText, tune


@dataclass(frozen=True)
class Options:
    """Measure what the Fisher's sample and its prior are worth."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of a language model."""
    words: tuple[int, ...] = (25_000, 100_000, 400_000)
    """Held-out training words the Fisher is estimated on."""
    priors: tuple[float, ...] = (0.0, 0.01, 0.04, 0.2)
    """Shares of the tensor's mean."""
    dynamic: str = "all"
    """Weights that adapt."""
    segment: int = 40
    """M."""
    budget: int = 8
    """Settings of RMS for each row."""
    threads: int = 1
    """CPU threads."""
    out: Path = HOME / "fisher"
    """Where fisher.json goes."""


def with_prior(base: AdaptationBase, prior: float) -> AdaptationBase:
    """The memory with a share of every tensor's mean in its Fisher."""
    rms = {n: smooth_fisher(r.square(), prior).sqrt() for n, r in base.rms.items()}
    return dataclasses.replace(base, rms=rms)


def smallest_share(base: AdaptationBase) -> float:
    """The RMS gradient that one in twenty words stays below, over the median word's."""
    bias = base.rms.get("softmax.bias")
    return math.nan if bias is None else float(bias.quantile(0.05) / bias.median())


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """One row for every sample and prior."""
    config = language_model(options.run).load_config()
    adapt = dataclasses.replace(
        config.adapt, dynamic=options.dynamic, update_every=options.segment, fisher_prior=0.0
    )
    run = open_run(dataclasses.replace(config, out=options.run, adapt=adapt), quiet=True)
    use_threads(options.threads)
    weights, shape, _ = load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    text: TuneText = run.tune_text
    words = sum(map(len, text.articles)) / run.validation_text(0).tokens_per_word
    making = Making(run.training_text(1), run.training_text(0))
    for number in options.words:
        sample = dataclasses.replace(adapt, fisher_words=number)
        plain = new_base(weights, shape, sample, making)
        plain = plain.guarded(adapt.guard, shape.vocabulary)
        static = static_of(plain, text, ("article",))["article"]
        for prior in options.priors:
            base = with_prior(plain, prior)
            best = tune(base, RMS(), text, "article", options.budget)[0]
            yield {
                "words of the Fisher": number,
                "prior": prior,
                "rare over median RMS": smallest_share(base),
                "step size": best.setting["rate"],
                "decay": best.setting["decay"],
                "gain": (static - best.nll) / words,
            }


def main() -> None:
    """Measure, print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    record("fisher", list(rows(options)), options)


if __name__ == "__main__":
    run_cli(main)
