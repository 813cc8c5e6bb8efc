"""Gain against cost: which weights should adapt, on one trained language model?

    python -m benchmarks.pareto runs/wikipedia

For every choice of weights, rank and segment length M: RMS dynamic evaluation tuned on validation,
then the meta-learner (`--rule`) trained from there. Gain: nats per word over static on the
validation articles that tuning reads, protocol article. Cost: scoring time over static scoring,
the two taking turns on the same text. Every finished row is kept in <out>/pareto.json, and one
measured before with the same settings is not measured again; the picture (PNG, SVG) and the CSV
beside it show all rows of the run and settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.output import HOME
from benchmarks.pareto_picture import draw
from benchmarks.timing import Work, ratio, side_by_side, speed, table, versions
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.names import LearnedName
from mlm.base.terminal import say
from mlm.models.base import AdaptationBase, fold_low_rank, has_low_rank
from mlm.models.extension import Making
from mlm.reading.scoring import score_articles
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Bound, LoadedRule, Parameters, as_parameters
from mlm.runs.base import new_base
from mlm.runs.rules import new_rule
from mlm.runs.run import Run, open_run
from mlm.store.models import load_lm
from mlm.store.run_folder import RunFolder, machine
from mlm.training.meta import MetaTrainer
from mlm.training.tuning import tune

SETS = (
    "softmax.bias",
    "bias",
    "softmax.low,softmax.bias@8",
    "softmax.low,softmax.bias@32",
    "softmax.low,softmax.bias@64",
    "lstm.*.input.low,softmax.bias@32",
    "lstm",
    "lstm.0.recurrent",
    "lstm.last.*",
    "lstm,softmax.bias",
    "lstm,softmax.low,softmax.bias@32",
    "embedding,softmax.bias",
)
STATIC_SEGMENT = 64
"""Tokens per step of static scoring, whatever M is: it has no updates to wait for."""
TIMING_FISHER_WORDS = 2_000
NEWER = {"rule": "three_levels", "lanes": 0, "unroll": 0}
"""Settings that rows measured before there were any do not name."""
SHOWN = ("dynamic", "rank", "segment", "rms", "learned", "time over static", "MB per lane")


@dataclass(frozen=True)
class Options:
    """Compare choices of dynamic weights by gain and cost on a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    sets: tuple[str, ...] = SETS
    """Choices, as for --dynamic, with @RANK for low-rank changes; `lstm.last` is the last
    layer and drops out where there is one layer only."""
    segment: tuple[int, ...] = (20, 64)
    """M: tokens between updates."""
    budget: int = 8
    """Settings tried for RMS."""
    rule: LearnedName = "three_levels"
    """The meta-learner."""
    steps: int = 16
    """Meta-updates."""
    lanes: int = 0
    """Articles that meta-training reads side by side; 0 = as the run's settings say."""
    unroll: int = 0
    """Updates that a meta-gradient looks through; 0 = as the run's settings say."""
    words: int = 12_000
    """Validation words that gains are measured on."""
    timing_tokens: int = 16_384
    """Tokens scored for the time, in equal parts in every lane."""
    repetitions: int = 5
    """Rounds in which static and adapting take turns; the median counts."""
    time_again: bool = False
    """Measure the times of all rows again, side by side: later, on a quieter machine."""
    out: Path = HOME / "pareto"
    """Where pareto.json and the picture go."""


@dataclass(frozen=True)
class Choice:
    """One point of the picture."""

    dynamic: str
    rank: int
    """0: no low-rank change."""
    segment: int


def choices(options: Options, layers: int, rank: int) -> list[Choice]:
    """All points to measure; `rank` is that of low-rank changes without @RANK.

    Raises:
        UserError: a rank that is no number.
    """
    found = []
    for word in options.sets:
        dynamic, at, number = word.partition("@")
        if at and not (re.fullmatch("[1-9][0-9]*", number) and has_low_rank(dynamic)):
            raise UserError(
                f"--sets {word}: @ is for a rank of at least 1, of weights such as softmax.low"
            )
        if "lstm.last" in dynamic and layers == 1:
            continue
        dynamic = dynamic.replace("lstm.last", f"lstm.{layers - 1}")
        own = int(number or rank) if has_low_rank(dynamic) else 0
        found += [Choice(dynamic, own, segment) for segment in options.segment]
    return found


class Bench:
    """The trained run, and what every choice is compared with."""

    def __init__(self, options: Options) -> None:
        self.options = options
        config = RunFolder(options.run).load_config()
        evaluation = dataclasses.replace(
            config.evaluation, tune_words=options.words, budget=options.budget
        )
        meta = dataclasses.replace(
            config.meta,
            steps=options.steps,
            lanes=options.lanes or config.meta.lanes,
            unroll=options.unroll or config.meta.unroll,
        )
        stages = {"out": options.run, "stages": ("meta",)}
        config = dataclasses.replace(config, evaluation=evaluation, meta=meta, **stages)
        self.run: Run = open_run(config, quiet=True)
        self.lm = self.run.folder.checkpoint("lm")
        weights, self.shape, _ = load_lm(self.lm, self.run.data.vocabulary.hash)
        self.weights = {name: w.to(self.run.device) for name, w in weights.items()}
        self.held = self.run.training_text(1)

    @cached_property
    def static_memory(self) -> AdaptationBase:
        """The language model itself, to be scored without updates."""
        return AdaptationBase(self.shape, self.weights, ("softmax.bias",), {}, 0.0, STATIC_SEGMENT)

    @cached_property
    def static_nats(self) -> float:
        """Static loss of the text that gains are measured on."""
        return self.nats(self.static_memory, None)

    @cached_property
    def words(self) -> float:
        """Words of that text."""
        tokens = sum(len(article) for article in self.run.tune_text.articles)
        return tokens / self.run.validation_text(self.options.words).tokens_per_word

    @cached_property
    def timing_text(self) -> list[np.ndarray]:
        """The beginnings of as many validation articles as there are lanes, about equally long."""
        lanes = self.run.config.evaluation.lanes
        every = self.run.validation_text(0).articles
        longest = sorted(every, key=len, reverse=True)[:lanes]
        return [article[: math.ceil(self.options.timing_tokens / lanes)] for article in longest]

    def nats(self, base: AdaptationBase, rule: Bound | None) -> float:
        """Loss of the validation articles, protocol article."""
        text = self.run.tune_text
        return score_articles(base, rule, text.articles, text.eos, text.lanes).total

    def gain(self, nats: float) -> float | None:
        """Nats per word over static; None = diverged."""
        return (self.static_nats - nats) / self.words if math.isfinite(nats) else None

    def scoring(self, base: AdaptationBase, rule: Bound | None) -> Work:
        """Scoring of the timing text."""
        text, eos = self.timing_text, self.run.tune_text.eos

        def work() -> int:
            score_articles(base, rule, text, eos, len(text))
            return sum(len(article) for article in text)

        return work

    def static_work(self) -> Work:
        """Static scoring of the timing text."""
        return self.scoring(self.static_memory, None)

    def base(self, choice: Choice, fisher_words: int) -> AdaptationBase:
        """The long-term memory of a choice."""
        adapt = dataclasses.replace(
            self.run.config.adapt,
            dynamic=choice.dynamic,
            update_every=choice.segment,
            rank=max(1, choice.rank),
            fisher_words=fisher_words,
        )
        making = Making(self.held, self.held)
        return fold_low_rank(new_base(self.weights, self.shape, adapt, making))

    def start(
        self, base: AdaptationBase, setting: dict[str, float]
    ) -> tuple[LinearGates, Parameters]:
        """The meta-learner as the run's settings want it, at RMS dynamic evaluation so tuned."""
        tuned = as_parameters(setting, base)
        return new_rule(self.run.config.meta, self.options.rule, LoadedRule(RMS(), tuned, base))

    def time_again(self, rows: list[dict[str, Any]]) -> None:
        """Replace the times of `rows` by new ones, all measured side by side.

        How long an update takes does not depend on what the gates have learned: they are used as
        they start.
        """
        work = {"static": self.static_work()}
        for number, row in enumerate(rows):
            choice = Choice(row["dynamic"], row["rank"], row["segment"])
            base = self.base(choice, TIMING_FISHER_WORDS)
            rule, parameters = self.start(base, row["setting"])
            work[str(number)] = self.scoring(base, rule.bind(parameters, base))
        times = side_by_side(work, self.options.repetitions)
        for number, row in enumerate(rows):
            row.update(_times(times[str(number)], times["static"]))

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all rows of this command have in common."""
        names = ("budget", *NEWER, "steps", "words", "timing_tokens", "repetitions")
        model = hashlib.sha256(self.lm.read_bytes()).hexdigest()[:16]
        more = {name: getattr(self.options, name) for name in names}
        return {"run": self.options.run.name, "model": model, **more}

    def settings(self, choice: Choice) -> dict[str, Any]:
        """What a row depends on besides the machine: rows with the same are the same row."""
        return {**self.common, **dataclasses.asdict(choice)}

    def measure(self, choice: Choice) -> dict[str, Any]:
        """Gain and cost of one choice.

        Raises:
            UserError: a pattern that matches nothing, or training that diverged.
        """
        run = self.run
        base = self.base(choice, run.config.adapt.fisher_words)
        best = tune(base, RMS(), run.tune_text, "article", self.options.budget)[0]
        rule, start = self.start(base, best.setting)
        trainer = MetaTrainer(base, rule, start, self.held, run.config.meta, run.config.seed)
        for _ in range(self.options.steps):
            trainer.train_step()
        bound = rule.bind(trainer.parameters, base)
        work = {"static": self.static_work(), "adapting": self.scoring(base, bound)}
        times = side_by_side(work, self.options.repetitions)
        size = sum(base.weights[n].numel() * base.weights[n].itemsize for n in base.dynamic)
        return {
            "setting": best.setting,
            "rms": self.gain(best.nll),
            "learned": self.gain(self.nats(base, bound)),
            **_times(times["adapting"], times["static"]),
            "bytes per lane": size,
            "MB per lane": size / 1e6,
        }


def _times(adapting: list[float], static: list[float]) -> dict[str, Any]:
    """What a row says about time."""
    factor = ratio(adapting, static)
    return {
        "time over static": factor.median,
        "time interval": [factor.low, factor.high],
        "static tokens per second": speed(static),
    }


def _saved_rows(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far.

    Raises:
        UserError: the file is damaged.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [NEWER | row for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to measure again") from None


def _save(path: Path, rows: list[dict[str, Any]]) -> None:
    about = {"machine": machine(), "versions": versions()}
    write_text(path, json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n")


def measure_all(bench: Bench, wanted: list[Choice], path: Path) -> list[dict[str, Any]]:
    """All rows in `path` of this run and these settings, what is wanted and missing measured now.

    A choice that cannot be measured (its training diverges) is reported and left out.
    """
    saved = _saved_rows(path)
    for number, choice in enumerate(wanted, start=1):
        settings = bench.settings(choice)
        row = next((r for r in saved if all(r.get(k) == v for k, v in settings.items())), None)
        if row is None:
            what = f"{choice.dynamic}, rank {choice.rank}, M {choice.segment}"
            say(f"{number} of {len(wanted)}: {what}")
            try:
                row = {**settings, **bench.measure(choice)}
            except UserError as error:
                say(f"left out: {error}")
                continue
            saved.append(row)
            _save(path, saved)
    common = bench.common
    found = [row for row in saved if all(row.get(k) == v for k, v in common.items())]
    if bench.options.time_again and found:
        bench.time_again(found)
        _save(path, saved)
    return found


def main() -> None:
    """Measure what is missing, print the table, draw."""
    options = tyro.cli(Options, description=__doc__)
    bench = Bench(options)
    wanted = choices(options, bench.shape.layers, bench.run.config.adapt.rank)
    rows = measure_all(bench, wanted, options.out / "pareto.json")
    if not rows:
        raise UserError("--sets: nothing to show; no choice could be measured")
    print(table([{key: row[key] for key in SHOWN} for row in rows]))
    print(options.out / "pareto.json", *draw(rows, options.out / "pareto"), sep="\n")


if __name__ == "__main__":
    run_cli(main)
