"""Every way to learn to remember, in one table: gain, speed and memory on one language model.

    python -m benchmarks.rules runs/wikipedia

Every row is an ordinary run in RUN/rules/<row>, made by stages `meta` and `evaluate` of `train.py`
with the flags in `ROWS` on the language model of RUN; a row that is there already with the same
settings is not measured again. Gains are nats per word over the static language model of RUN on
the articles of the validation split, intervals paired bootstrap over articles. All rules have the
same budget: so many settings tried or steps judged on validation, the same meta-updates.
`--others` adds runs with language models of their own (trained through the adaptation, or another
base model, on the same text), and `--time-again` measures the times of all rows side by side.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from benchmarks.output import HOME
from benchmarks.rows import language_model, prepare
from benchmarks.timing import Work, side_by_side, speed, table, versions
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.names import CACHE, LEARNED
from mlm.base.terminal import say
from mlm.models.base import AdaptationBase
from mlm.reading.scoring import score_protocol
from mlm.reading.static import StaticReader
from mlm.reading.step import Reader, begin, step
from mlm.report.evaluation import bootstrap_interval, mean_gain, read_evaluation
from mlm.rules.gates import LinearGates
from mlm.runs.rules import Ready, load_learned, ready_rule
from mlm.runs.run import Run, open_run
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.stages.meta import meta_text
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder, machine
from mlm.text.streams import LaneStream
from mlm.training.meta import MetaTrainer, weights_to_learn

MARKS = (40, 200, 1000)
"""Updates after which the distance from theta_0 is noted on the way through one long text."""
SHOWN = (
    "row",
    "rule",
    "article",
    "stream",
    "parameters",
    "training tokens/s",
    "scoring tokens/s",
    "MB per lane",
    "drift",
    "late gain",
    "resets",
    "long resets",
)


@dataclass(frozen=True)
class Row:
    """A run, and the rules of it that are shown."""

    rules: tuple[str, ...]
    """Learned ones among them are trained."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Settings of stage 2 other than those of RUN."""


def _learned(rule: str, *more: str, **meta: Any) -> Row:
    return Row((rule, *more), meta)


ROWS: dict[str, Row] = {
    "hand-made": Row(("static+cache", "sgd", "momentum", "rms", "adam", "rms+cache")),
    "tensor steps": _learned("tensor_steps"),
    "weight steps": _learned("weight_steps"),
    "2 levels": _learned("two_levels"),
    "3 levels": _learned("three_levels", "three_levels+cache"),
    "surprise": _learned("surprise"),
    "adaptive": _learned("adaptive"),
    "unit steps": _learned("unit_steps"),
    "4 levels": _learned("four_levels", "four_levels+cache"),
    "from SGD": _learned("three_levels", start="sgd"),
    "no Fisher": _learned("three_levels", start="sgd", fisher="off"),
    "Fisher in FLUSH": _learned("three_levels", start="sgd", fisher="flush"),
    "EWC": _learned("three_levels", ewc=1.0),
    "boundaries reset": _learned("three_levels", stream_share=0.0),
    "boundaries learned": _learned("three_levels", stream_share=1.0),
    "theta_0": _learned("three_levels", learn=("theta_0",)),
    "Reptile": _learned("three_levels", learn=("theta_0",), theta_0="reptile"),
    "rule and theta_0": _learned("three_levels", learn=("rule", "theta_0")),
    "all weights": _learned("three_levels", learn=("rule", "theta_0", "static")),
    "all, weight steps": _learned("weight_steps", learn=("rule", "theta_0", "static")),
    "second order": _learned("three_levels", gradient="second", unroll=4),
    "unroll of 4": _learned("three_levels", unroll=4),
    "PES": _learned("three_levels", gradient="pes"),
    "MLP": _learned("mlp"),
    "LSTM": _learned("lstm"),
}


@dataclass(frozen=True)
class Options:
    """Compare all ways to learn to remember on a trained language model."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder; only its language model and settings are used."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to measure."""
    others: tuple[Path, ...] = ()
    """Runs with language models of their own on the same text; their first rules are RMS and 3
    levels where the model can adapt, else it is static."""
    budget: int = 8
    """Settings, or steps of training, judged on validation."""
    steps: int = 24
    """Meta-updates."""
    lanes: int = 8
    """Articles that meta-training reads side by side."""
    articles: int = 0
    """Articles of the validation split to score; 0 = all."""
    words: int = 6_000
    """Validation words of one judgement."""
    timing_tokens: int = 8_192
    """Tokens of one round of timing."""
    repetitions: int = 5
    """Rounds."""
    updates: int = 2_000
    """Length of the long text, in updates."""
    time_again: bool = False
    """Measure times and the long text again, for all rows that are there."""
    out: Path = HOME / "rules"
    """Where rules.json goes."""


def row_config(options: Options, base: Config, row: Row, out: Path) -> Config:
    """Settings of a row's run."""
    trained = tuple(rule for rule in row.rules if rule in LEARNED)
    own = {"rules": trained, "steps": options.steps, "lanes": options.lanes, **row.meta}
    meta = dataclasses.replace(base.meta, **own)
    evaluation = dataclasses.replace(
        base.evaluation,
        rules=tuple(dict.fromkeys(("static", *row.rules))),
        protocols=("article", "stream"),
        budget=options.budget,
        tune_words=options.words,
        max_articles=options.articles,
    )
    adapt = base.adapt
    if base.model.cell == "snail":  # it is scored as it is
        adapt = dataclasses.replace(adapt, dynamic="softmax.bias")
    stages = {"stages": ("meta", "evaluate"), "resume": False, "overwrite": False}
    return validate(
        dataclasses.replace(base, out=out, adapt=adapt, meta=meta, evaluation=evaluation, **stages)
    )


class Bench:
    """The runs of all rows."""

    def __init__(self, options: Options) -> None:
        unknown = [name for name in options.rows if name not in ROWS]
        if unknown:
            raise UserError(f"--rows {', '.join(unknown)}: choose from {', '.join(ROWS)}")
        self.options = options
        language_model(options.run)

    def path(self, name: str, where: Path | None = None) -> Path:
        """The run folder of a row."""
        return (where or self.options.run) / "rules" / name.replace(" ", "_").replace(",", "")

    def measure(self, name: str, row: Row, where: Path | None = None) -> Path:
        """Run a row unless it is there with the same settings; returns its folder.

        Raises:
            UserError: training or scoring diverged.
        """
        where = where or self.options.run
        path = self.path(name, where)
        config = row_config(self.options, RunFolder(where).load_config(), row, path)
        done = path / "evaluation.json"
        if done.exists():
            known = dataclasses.replace(RunFolder(path).load_config(), out=config.out)
            if known == config:
                return path
        prepare(path, RunFolder(where), self.path("hand-made", where))
        done.unlink(missing_ok=True)
        run_stages(config, quiet=True)
        return path

    # -- what the table says ----------------------------------------------------------------

    def static_nll(self) -> dict[tuple[str, int], float]:
        """Loss of each (protocol, article) under the language model of the table."""
        rows = read_evaluation(self.path("hand-made"))
        return {
            (r["protocol"], r["article"]): r["nll"]
            for r in rows
            if r["kind"] == "article" and r["rule"] == "static"
        }

    def gains(self, path: Path, rule: str) -> dict[str, Any]:
        """Nats per word over the static model of the table in each protocol, with intervals."""
        static, found = self.static_nll(), {}
        rows = read_evaluation(path)
        for protocol in ("article", "stream"):
            mine = [
                r
                for r in rows
                if (r["kind"], r["rule"], r["protocol"]) == ("article", rule, protocol)
            ]
            gain_A = np.array([static[protocol, r["article"]] - r["nll"] for r in mine])
            words_A = np.array([r["words"] for r in mine])
            found[protocol] = float(mean_gain(gain_A, words_A))
            found[f"{protocol} interval"] = bootstrap_interval(mean_gain, gain_A, words_A)
            total = next(
                r
                for r in rows
                if (r["kind"], r["rule"], r["protocol"]) == ("total", rule, protocol)
            )
            found.setdefault("resets", 0)
            found["resets"] += total.get("resets", 0)
        return found

    def entry(self, name: str, path: Path, rule: str) -> dict[str, Any]:
        """One line of the table, times apart."""
        run = open_run(dataclasses.replace(RunFolder(path).load_config(), device="cpu"), True)
        ready = ready_rule(run, rule, "article")
        return {
            "row": name,
            "rule": rule,
            "folder": path.name,
            **self.gains(path, rule),
            "parameters": _parameters(run, rule),
            "MB per lane": _lane_bytes(ready) / 1e6,
        }


def _parameters(run: Run, rule: str) -> int:
    """Numbers that were learned, or tuned, beside the language model."""
    base, cached = rule.removesuffix(CACHE), 2 * rule.endswith(CACHE)
    if base in LEARNED:
        learned, learn = load_learned(run, base, run.base), run.config.meta.learn
        moved = [run.base.weights[n].numel() for n in weights_to_learn(run.base, learn)]
        mine = sum(p.numel() for p in learned.parameters.values())
        return sum(moved) + cached + mine * ("rule" in learn)
    return len(ready_rule(run, rule, "article").setting)


def _lane_bytes(ready: Ready) -> int:
    """Bytes that a lane holds while it reads: weights, the rule's state, a cache's keys."""
    found = 0
    if ready.bound is not None:
        found += sum(w.numel() * w.itemsize for w in ready.bound.start().values())
    width = ready.base.weights["embedding"].shape[-1]
    return found + sum(cache.window * (4 * width + 8) for cache in ready.cache)


# -- times ----------------------------------------------------------------------------------


def scoring(run: Run, ready: Ready, tokens: int) -> Work:
    """Scoring of the beginnings of as many articles as there are lanes."""
    lanes = run.config.evaluation.lanes
    every = sorted(run.validation_text(0).articles, key=len, reverse=True)[:lanes]
    text = [article[: math.ceil(tokens / lanes)] for article in every]
    eos = run.tune_text.eos

    def work() -> int:
        score_protocol(ready.base, ready.bound, text, eos, "article", len(text), None, ready.cache)
        return sum(len(article) for article in text)

    return work


def training(run: Run, rule: str) -> Work | None:
    """One meta-update of four segments; None for what is not trained."""
    if rule not in LEARNED:
        return None
    learned = load_learned(run, rule, run.base)
    assert isinstance(learned.rule, LinearGates)
    meta = dataclasses.replace(run.config.meta, unroll=4)
    trainer = MetaTrainer(
        learned.base, learned.rule, learned.parameters, meta_text(run), meta, run.config.seed
    )
    return lambda: trainer.train_step()[1]


def times(options: Options, entries: list[dict[str, Any]], paths: Sequence[Path]) -> None:
    """Fill in tokens per second, all rows side by side."""
    work: dict[str, Work] = {}
    for k, (entry, path) in enumerate(zip(entries, paths, strict=True)):
        run = open_run(RunFolder(path).load_config(), True)
        work[f"{k} score"] = scoring(
            run, ready_rule(run, entry["rule"], "article"), options.timing_tokens
        )
        train = training(run, entry["rule"])
        if train is not None:
            work[f"{k} train"] = train
    found = side_by_side(work, options.repetitions)
    for k, entry in enumerate(entries):
        entry["scoring tokens/s"] = speed(found[f"{k} score"])
        entry["training tokens/s"] = speed(found[f"{k} train"]) if f"{k} train" in found else None


# -- one long text --------------------------------------------------------------------------


@torch.no_grad()
def endurance(run: Run, ready: Ready, updates: int, lanes: int = 2) -> dict[str, Any]:
    """Read one text of so many updates per lane without a reset; distance from theta_0 on the way.

    Returns:
        drift: |theta - theta_0| / |theta_0| over all dynamic weights, mean over lanes, at the end,
        and `drift at` the updates in `MARKS`; late: loss in nats per token of the last tenth, and
        `late static` that of the language model on the same tokens; long resets: by the guard.
    """
    base, rule = ready.base, ready.bound
    if rule is None:
        return {}
    whole = np.concatenate(list(run.validation_text(0).articles))
    texts = [
        np.resize(np.roll(whole, -k * len(whole) // lanes), updates * base.segment)
        for k in range(lanes)
    ]
    reader, static = begin(base, lanes, rule), StaticReader(base, lanes)
    resets, late, drift = 0, [], {}
    for t, segment in enumerate(LaneStream(texts, lanes, base.segment, run.tune_text.eos)):
        now = step(base, rule, reader, segment)
        reader, resets = now.after, resets + int(now.flushed.sum())
        nll = static.read(segment).nll * segment.mask
        if t >= updates - max(1, updates // 10):
            late.append((float(now.scored.nll.mean()), float(nll.mean())))
        if t + 1 in (*MARKS, updates):
            drift[t + 1] = _distance(base, reader)
    adapted, static = (statistics.mean(column) for column in zip(*late, strict=True))
    return {
        "drift": drift[updates],
        "drift at": {str(k): v for k, v in drift.items()},
        "late": adapted,
        "late static": static,
        "long resets": resets,
    }


def _distance(base: AdaptationBase, reader: Reader) -> float:
    away = sum(float((reader.weights[n] - base.weights[n]).square().sum()) for n in base.dynamic)
    home = sum(float(base.weights[n].square().sum()) for n in base.dynamic)
    return math.sqrt(away / len(reader.age) / home)


# -- all ------------------------------------------------------------------------------------


def _other_row(path: Path) -> Row:
    """What is shown of a run with a language model of its own."""
    if RunFolder(path).load_config().model.cell == "snail":
        return Row(("static",))
    return Row(("static", "rms", "three_levels"))


def main() -> None:
    """Measure what is missing, print the table."""
    options = tyro.cli(Options, description=__doc__)
    bench = Bench(options)
    wanted = {"hand-made": ROWS["hand-made"], **{name: ROWS[name] for name in options.rows}}
    places = [(name, row, options.run) for name, row in wanted.items()]
    places += [(path.name, _other_row(path), path) for path in options.others]
    path = options.out / "rules.json"
    entries: list[dict[str, Any]] = []
    folders: list[Path] = []
    known = _known(path)
    for number, (name, row, where) in enumerate(places, start=1):
        say(f"{number} of {len(places)}: {name}")
        try:
            folder = bench.measure(name, row, where)
        except UserError as error:
            if not entries:  # all others are compared with the first
                raise
            say(f"left out: {error}")
            continue
        for rule in row.rules:
            entry = bench.entry(name, folder, rule)
            old = known.get((name, rule), {})
            if old.get("article") != entry["article"]:  # it was trained again since
                old = {}
            entries.append({**{k: v for k, v in old.items() if k not in entry}, **entry})
            folders.append(folder)
        _save(path, entries)
    again = options.time_again
    for k in [k for k, e in enumerate(entries) if again or "drift" not in e]:
        say(f"{options.updates:,} updates: {entries[k]['row']}, {entries[k]['rule']}")
        run = open_run(RunFolder(folders[k]).load_config(), True)
        ready = ready_rule(run, entries[k]["rule"], "stream")
        entries[k].update(endurance(run, ready, options.updates))
        _save(path, entries)
    if again or any("scoring tokens/s" not in entry for entry in entries):
        times(options, entries, folders)
    for entry in entries:
        if "late" in entry:
            entry["late gain"] = entry["late static"] - entry["late"]
    _save(path, entries)
    print(table([{key: entry.get(key) for key in SHOWN} for entry in entries]))
    print(path)


def _known(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of the last time, by name and rule."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to measure again") from None
    return {(row["row"], row["rule"]): row for row in rows}


def _save(path: Path, rows: list[dict[str, Any]]) -> None:
    about = {"machine": machine(), "versions": versions()}
    write_text(path, json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    run_cli(main)
