"""Which weights should adapt? Gain and speed of each choice on one and the same language model.

    python -m benchmarks.dynamic_sets runs/pydocs

For every set: RMS dynamic evaluation tuned on validation, then the three-level meta-learner
trained from there; both judged on the validation articles that tuning reads. Prints a table and
writes it, with machine and settings, to <out>/dynamic_sets.json.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.output import HOME
from mlm.base.errors import run_cli

SETS = ("bias", "softmax.bias", "lstm", "lstm,softmax.bias", "embedding,softmax.bias", "all")


@dataclass(frozen=True)
class Options:
    """Compare choices of dynamic weights on a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    sets: tuple[str, ...] = SETS
    """Choices to compare, as for --dynamic."""
    budget: int = 8
    """Settings tried for RMS."""
    steps: int = 16
    """Meta-updates."""
    words: int = 12_000
    """Validation words each evaluation reads."""
    out: Path = HOME / "dynamic_sets"
    """Folder of dynamic_sets.json."""


def measure(options: Options, dynamic: str) -> dict[str, float | int | str]:
    """One row of the table."""
    from mlm.models.base import AdaptationBase, choose_dynamic
    from mlm.reading.scoring import score_articles
    from mlm.rules.gates import LinearGates
    from mlm.rules.hand_made import RMS
    from mlm.runs.run import open_run
    from mlm.store.models import load_lm
    from mlm.store.run_folder import RunFolder
    from mlm.training.fisher import estimate_fisher
    from mlm.training.meta import MetaTrainer
    from mlm.training.tuning import tune

    config = RunFolder(options.run).load_config()
    evaluation = dataclasses.replace(
        config.evaluation, tune_words=options.words, budget=options.budget
    )
    config = dataclasses.replace(config, out=options.run, stages=("meta",), evaluation=evaluation)
    run = open_run(config, quiet=True)
    weights, shape, _ = load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    held, text = run.training_text(1), run.tune_text
    names = choose_dynamic(weights, dynamic)
    adapt, meta = config.adapt, dataclasses.replace(config.meta, steps=options.steps)
    bare = AdaptationBase(shape, weights, names, {}, 0.0, adapt.update_every)
    base = estimate_fisher(bare, held, adapt.fisher_words, prior=adapt.fisher_prior)
    tokens = sum(len(a) for a in text.articles)
    words = tokens / run.validation_text(options.words).tokens_per_word
    static = score_articles(base, None, text.articles, text.eos, text.lanes)
    best = tune(base, RMS(), text, "article", options.budget)[0]
    rule = LinearGates(features=meta.features, per_tensor=meta.per_tensor)
    start = rule.start_at_rms(base, best.setting["rate"], best.setting["decay"])
    trainer = MetaTrainer(base, rule, start, held, meta, config.seed)
    clock = time.perf_counter()
    read = sum(trainer.train_step()[1] for _ in range(meta.steps))
    seconds = time.perf_counter() - clock
    learned = score_articles(
        base, rule.bind(trainer.parameters, base), text.articles, text.eos, text.lanes
    )
    return {
        "dynamic": dynamic,
        "weights_per_lane": sum(weights[n].numel() for n in names),
        "rms_nats_per_word": (static.total - best.nll) / words,
        "learned_nats_per_word": (static.total - learned.total) / words,
        "scoring_words_per_second": words / learned.seconds,
        "scoring_time_over_static": learned.seconds / static.seconds,
        "meta_training_tokens_per_second": read / seconds,
    }


def main() -> None:
    """Measure every set, print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    from benchmarks.timing import record
    from mlm.base.terminal import say

    rows = []
    for number, dynamic in enumerate(options.sets, start=1):
        say(f"{number} of {len(options.sets)}: {dynamic}")
        rows.append(measure(options, dynamic))
    record("dynamic_sets", rows, options)


if __name__ == "__main__":
    run_cli(main)
