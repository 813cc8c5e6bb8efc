"""What a word costs: the learned rule, RMS dynamic evaluation in our engine and as published.

    python -m benchmarks.claim_speed runs/ordinary

Reads the beginnings of validation articles with the rules that `benchmarks.claim` left in
RUN/claim, all taking turns, each with one thread or with all, as suits it. The published loop is
that of Krause et al. (2018): batch 1, M = 5, `loss.backward()`, an update parameter by parameter,
all weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from benchmarks.contestants import Setting, krause
from benchmarks.output import HOME
from benchmarks.rules import scoring
from benchmarks.timing import Work, best_threads, ratio, record, speed
from mlm.base.errors import run_cli
from mlm.kernels.switches import use_threads
from mlm.models.base import AdaptationBase
from mlm.models.recurrent import BaseModel
from mlm.reading.static import static_loss
from mlm.runs.rules import ready_rule
from mlm.runs.run import Run, open_run
from mlm.store.run_folder import RunFolder
from mlm.text.streams import LaneStream

LEARNED_RULE = "4 levels"
RULES = {
    "static": ("lstm", "static"),
    "RMS (lstm)": ("lstm", "rms"),
    "RMS (all)": ("all", "rms"),
    "RMS (same)": ("same", "rms"),
    "2 levels": ("fewer_levels", "two_levels"),
    "3 levels": ("fewer_levels", "three_levels"),
    LEARNED_RULE: ("seed_0", "four_levels"),
    "static + cache": ("lstm", "static+cache"),
    "4 levels + cache": ("seed_0", "four_levels+cache"),
}
"""Name, folder in RUN/claim and rule."""
PUBLISHED, PUBLISHED_SEGMENT = "RMS, the published loop", 5


@dataclass(frozen=True)
class Options:
    """Time per word of the rules of the claim."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of the ordinary language model."""
    tokens: int = 16_384
    """Tokens of one turn; the published loop reads a sixteenth."""
    rounds: int = 7
    """Turns of each."""
    threads: int = 0
    """CPU threads for all; 0 = for everybody what is faster, one or PyTorch's choice."""
    out: Path = HOME / "claim_speed"
    """Where speed.json goes."""


def published(run: Run, base: AdaptationBase, tokens: int) -> Work:
    """Krause's loop on the run's own model and text, one article after the other."""
    step = krause(base, Setting(rate=1e-4, decay=2e-3), 1)
    article = max(run.validation_text(0).articles, key=len)[:tokens]

    def work() -> int:
        for segment in LaneStream([article], 1, base.segment, run.tune_text.eos):
            step(segment)
        return len(article)

    return work


def static_work(run: Run, tokens: int) -> Work:
    """Scoring without adapting, in segments as long as training's."""
    text = run.validation_text(0)
    whole = np.concatenate(list(text.articles))[:tokens]
    lanes = run.config.evaluation.lanes
    parts = np.array_split(whole, lanes)
    shape = run.base.model
    assert isinstance(shape, BaseModel)

    def work() -> int:
        piece = type(text)(parts, 1, text.eos)
        static_loss(run.base.weights, shape, piece, lanes, run.config.lm.segment)
        return len(whole)

    return work


def main() -> None:
    """Print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    use_threads(options.threads)
    number = torch.get_num_threads()  # the runs ask for one
    work: dict[str, Work] = {}
    segments: dict[str, int] = {}
    for name, (folder, rule) in RULES.items():
        if not (options.run / "claim" / folder).exists():  # a form that was left out
            continue
        run = open_run(RunFolder(options.run / "claim" / folder).load_config(), quiet=True)
        segments[name] = run.config.adapt.update_every
        if rule == "static":
            work[name] = static_work(run, options.tokens)
        else:
            work[name] = scoring(run, ready_rule(run, rule, "article"), options.tokens)
    run = open_run(RunFolder(options.run / "claim" / "all").load_config(), quiet=True)
    base = dataclasses.replace(run.base, segment=PUBLISHED_SEGMENT)
    work[PUBLISHED] = published(run, base, options.tokens // 16)
    segments[PUBLISHED] = PUBLISHED_SEGMENT
    use_threads(number)
    found, used = best_threads(work, options.rounds, options.threads)
    per_word = run.validation_text(0).tokens_per_word
    rows: list[dict[str, Any]] = [
        {
            "rule": name,
            "M": segments[name],
            "threads": used[name],
            "words/s": speed(found[name]) / per_word,
            "time / static": ratio(found[name], found["static"]),
            "4 levels / it": ratio(found[LEARNED_RULE], found[name]),
        }
        for name in work
    ]
    record("speed", rows, options)


if __name__ == "__main__":
    run_cli(main)
