"""Does the learned rule gain more than tuned dynamic evaluation? Every figure of the claim.

    python -m benchmarks.claim runs/ordinary --through runs/through --split test

Language models of the same text and number of tokens: one trained as usual, others trained through
the adaptation (`--lm.through`), without and with n-gram embeddings, and, as a control, one that
learned n-gram embeddings as usual. On the first, the meta-learner is trained with several seeds and
judged on the first validation words; of the others each run is a seed, read with the rule it was
trained through, if that was a learned one, or with one trained for it. RMS dynamic evaluation is
tuned on those words in several forms (`--forms`), its published setting among the candidates of
each, with more evaluations for each form and protocol than a meta-learner has in all; the best form
in each protocol is the rival. It is tuned and read on the first seed of the other models, too, and
on the ordinary one once more with the learned rule's n-gram memory, tuned with it.
Every reading is an ordinary run in RUN/claim/<name>, made by stages `meta` and `evaluate` of
`train.py`; what is there with the same settings is not made again, so processes started with
`--only` can share the work. A run that has trained the learned rule itself lends the settings of
that training, where options say nothing else, and its rule is that of seed 0.

The losses of all readings are put side by side, word by word: gains are nats per word over the
*ordinary* static model, intervals paired bootstrap over articles, the gain of a learned rule is the
mean over its seeds. `--away` names corpora of another kind, read by the same checkpoints: the rival
and the learned rule, all its seeds on the ordinary language model, one on the others. So is what
`--valid` adds: the validation articles on which nothing but the checkpoint of stage 1 was chosen.
Letters: N words, A articles.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.claim_readings import (
    Options,
    Reading,
    articles_of,
    forms,
    memory_readings,
    readings,
    with_own_settings,
)
from benchmarks.claim_tables import FORM, LEARNED_RULE, MEMORY, OTHERS, Seeds, write_tables
from benchmarks.output import MADE
from benchmarks.rows import language_model, prepare, take_rules
from benchmarks.timing import record
from benchmarks.unread import write_untuned
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.names import CACHE, PROTOCOLS
from mlm.base.terminal import say
from mlm.report.evaluation import read_evaluation
from mlm.report.losses import LossTable, column_name
from mlm.runs.identity import identity
from mlm.runs.rules import tuned_rule, tuned_settings
from mlm.runs.run import Run, open_run
from mlm.stages.evaluate import (
    forget_scores,
    results_folder,
    stage_evaluate,
    text_to_score,
)
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder
from mlm.text.corpora import open_corpus

# -- making them --------------------------------------------------------------------------------


def make(reading: Reading, options: Options) -> Run:
    """The reading's run: rules tuned and trained, if they are not yet.

    Raises:
        UserError: training diverged.
    """
    config, path = reading.config(options), reading.path
    run = open_run(config, quiet=True)
    source, tuned = language_model(reading.where), path.parent / "seed_0"
    prepare(path, source, tuned if tuned != path and tuned.exists() else source.path)
    mark, made = identity(run, learned=bool(config.meta.rules)), path / MADE
    if _mark(made) != mark:
        for stale in (made, *path.glob("**/evaluation.*"), *path.glob("**/losses.parquet")):
            stale.unlink(missing_ok=True)
        if take_rules(run, source):
            say(f"{reading.name}: trained before, {source.path}")
        else:
            say(f"{reading.name}: training")
            again = RunFolder(path).config_file.exists()
            run_stages(dataclasses.replace(config, resume=again), quiet=True)
        write_text(made, json.dumps({"identity": mark}) + "\n")
    RunFolder(path).save_config(dataclasses.replace(config, stages=("meta", "evaluate")))
    return run


def read(reading: Reading, run: Run, corpus: str, articles: int = 0) -> LossTable:
    """The losses on the first `articles` of a corpus (0 = all), scored if they are not yet.

    Raises:
        UserError: a loss is not finite.
    """
    evaluation = dataclasses.replace(run.config.evaluation, max_articles=articles)
    run = run.with_config(dataclasses.replace(run.config, evaluation=evaluation))
    text, folder = text_to_score(run, corpus), results_folder(run, corpus)
    split = text.split
    wanted = {(split, p, rule, text.mark) for p in PROTOCOLS for rule in reading.columns}
    rows = read_evaluation(folder)
    if not wanted <= {(r["split"], r["protocol"], r["rule"], r.get("text")) for r in rows}:
        say(f"{reading.name}: reading {corpus}, {split}, {len(text.chosen)} articles")
        stage_evaluate(run, corpus)
        forget_scores(folder)
    return LossTable.load(folder / "losses.parquet", split)


def _mark(path: Path) -> str | None:
    """What the folder's results were made for."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def tuned_rival(reading: Reading, options: Options) -> list[dict[str, Any]]:
    """A form of RMS dynamic evaluation, tuned in each protocol."""
    rows = []
    run = make(reading, options)
    words = run.validation_text(run.config.evaluation.tune_words).words
    for protocol in PROTOCOLS:
        tuned_rule(run, run.base, "rms", protocol)
        known = json.loads((reading.path / "tuning.json").read_text(encoding="utf-8"))
        best = known[f"rms/{protocol}"]["trials"][0]
        rows.append(
            {
                "form": reading.columns["rms"].removeprefix(FORM),
                "weights": run.config.adapt.dynamic,
                "M": run.config.adapt.update_every,
                "protocol": protocol,
                "rate": best["rate"],
                "decay": best["decay"],
                "word perplexity, tuning words": math.exp(best["nll"] / words),
                "nll": best["nll"],
            }
        )
    return rows


def rivals(options: Options) -> list[dict[str, Any]]:
    """RMS dynamic evaluation in every form and protocol, tuned, the best of a protocol marked."""
    rows = [row for form in forms(options).values() for row in tuned_rival(form, options)]
    for protocol in PROTOCOLS:
        mine = [row for row in rows if row["protocol"] == protocol]
        best = min(mine, key=lambda row: row["nll"])
        for row in mine:
            row["rival"] = "yes" if row is best else None
    return rows


# -- side by side -------------------------------------------------------------------------------


def merge(
    made: Sequence[tuple[Reading, LossTable]], chosen: Mapping[str, str]
) -> tuple[LossTable, Seeds]:
    """One table with a column for every reading, for the rival, and for means over seeds.

    Raises:
        UserError: two readings are of different text.
    """
    first = made[0][1]
    columns = {column_name("static", p): first.losses[column_name("static", p)] for p in PROTOCOLS}
    seeds: Seeds = {}
    for reading, table in made:
        if len(table.word_N) != len(first.word_N) or (table.word_N != first.word_N).any():
            raise UserError(f"{reading.path} was made on other text; delete it and start again")
        for rule, name in reading.columns.items():
            pooled, _, seed = name.partition(", seed ")
            if seed:
                seeds.setdefault(pooled, []).append(name)
            for p in PROTOCOLS:
                columns[column_name(name, p)] = table.losses[column_name(rule, p)]
    for p, form in chosen.items():
        alike = [("", ending) for ending in ("", CACHE, MEMORY, MEMORY + CACHE)]
        for start, ending in (*alike, *((title, "") for title in OTHERS.values())):
            own = column_name(f"{start}rms, {form}{ending}", p)
            if own in columns:
                columns[column_name(f"{start}rms{ending}", p)] = columns[own]
    for pooled, names in seeds.items():
        for p in PROTOCOLS:
            every = [columns[column_name(name, p)].astype(np.float64) for name in names]
            columns[column_name(pooled, p)] = np.mean(every, 0)
    return dataclasses.replace(first, losses=columns), seeds


def _chosen(tuned: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The rival's form in each protocol, from the rows of `rivals`."""
    return {row["protocol"]: row["form"] for row in tuned if row["rival"]}


def _is_tuned(form: Reading, options: Options) -> bool:
    """Whether a form of the rival is tuned in each protocol; another process may be at it."""
    if not (form.path / MADE).exists():
        return False
    known = tuned_settings(open_run(form.config(options), quiet=True))
    return {f"rms/{protocol}" for protocol in PROTOCOLS} <= known.keys()


def _some(options: Options) -> list[Reading]:
    """The readings that --only names; the rival's with its caches once every form is tuned.

    Raises:
        UserError: it names none.
    """
    ready = all(_is_tuned(form, options) for form in forms(options).values())
    every = readings(options, _chosen(rivals(options)) if ready else {})
    found = [r for r in every if r.name.startswith(options.only)]
    if not found:
        names = ", ".join(r.name for r in every)
        raise UserError(f"--only {' '.join(options.only)}: there are {names}")
    return found


def _read_all(
    every: Sequence[Reading], options: Options, corpora: Mapping[str, int]
) -> dict[str, list[tuple[Reading, LossTable]]]:
    """Make and score the readings; corpora beyond the first are read by those that travel.

    Args:
        corpora: how many articles of each are read; 0 = all.
    """
    found: dict[str, list[tuple[Reading, LossTable]]] = {corpus: [] for corpus in corpora}
    for reading in every:
        run = make(reading, options)
        for corpus in corpora if reading.travels else [*corpora][:1]:
            found[corpus].append((reading, read(reading, run, corpus, corpora[corpus])))
    return found


def _read_long(every: Sequence[Reading], options: Options) -> LossTable:
    """The corpus of long articles under the first seed of the learned rule."""
    first = next(reading for reading in every if reading.name == "ordinary/seed 0")
    first = dataclasses.replace(first, columns={LEARNED_RULE: LEARNED_RULE})
    return read(first, open_run(first.config(options), quiet=True), options.long)


def main() -> None:
    """Make what is missing, then the tables and pictures."""
    options = tyro.cli(Options, description=__doc__)
    config = language_model(options.run).load_config()
    options = tyro.cli(Options, default=with_own_settings(Options(options.run)))
    names = [config.corpus, *options.away]
    number = articles_of(options, len(names) + options.valid)
    if options.valid:
        to = options.run / "claim" / "texts" / "valid_untuned"
        write_untuned(config.corpus, config.evaluation.tune_words, to / f"{options.split}.txt")
        names.append(str(to))
    corpora = dict(zip(names, number, strict=True))
    if options.only:
        _read_all(_some(options), options, corpora)
        return
    tuned = rivals(options)
    chosen = _chosen(tuned)
    every = readings(options, chosen)
    made = _read_all(every, options, corpora)
    merged = {open_corpus(corpus).name: merge(made[corpus], chosen) for corpus in corpora}
    tuned += [row for r in memory_readings(options, chosen) for row in tuned_rival(r, options)]
    record("rivals", tuned, options)
    long = _read_long(every, options) if options.long else None
    write_tables(merged, options, chosen, long)


if __name__ == "__main__":
    run_cli(main)
