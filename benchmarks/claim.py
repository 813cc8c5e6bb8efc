"""Does the learned rule gain more than tuned dynamic evaluation? Every figure of the claim.

    python -m benchmarks.claim runs/ordinary --through runs/through --split test

Language models of the same text and number of tokens: one trained as usual, others trained through
the adaptation (`--lm.through`), without and with n-gram embeddings, and, as a control, one that
learned n-gram embeddings as usual. On the first, the meta-learner is trained with several seeds and
judged on the first validation words; of the others each run is a seed, read with the rule it was
trained through, if that was a learned one, or with one trained for it. RMS dynamic evaluation is
tuned on those words in several forms (`--forms`), its published setting among the candidates of
each, with more evaluations for each form and protocol than a meta-learner has in all; the best form
in each protocol is the rival. It is tuned and read on the first seed of the other models, too.
Every reading is an ordinary run in RUN/claim/<name>, made by stages `meta` and `evaluate` of
`train.py`; what is there with the same settings is not made again, so processes started with
`--only` can share the work.

The losses of all readings are put side by side, word by word: gains are nats per word over the
*ordinary* static model, intervals paired bootstrap over articles, the gain of a learned rule is the
mean over its seeds. `--away` names corpora of another kind, read by the same checkpoints: the rival
and the learned rule, all its seeds on the ordinary language model, one on the others. Letters: N
words, A articles.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from benchmarks.claim_tables import CONTROLS, LEARNED_RULE, OTHERS, Seeds, write_tables
from benchmarks.output import HOME
from benchmarks.rows import language_model, prepare
from benchmarks.timing import record
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.names import CACHE, LEARNED, PROTOCOLS
from mlm.base.terminal import say
from mlm.extensions import (
    Extensions,
    IntraSegment,
    LearnedBasis,
    NGramEmbeddings,
    NGramReadOut,
    WordCoupling,
)
from mlm.report.evaluation import read_evaluation
from mlm.report.losses import LossTable, column_name
from mlm.runs.identity import identity
from mlm.runs.rules import tuned_rule
from mlm.runs.run import Run, open_run
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.presets import settings
from mlm.stages.evaluate import forget_scores, results_folder, stage_evaluate
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder
from mlm.text.corpora import open_corpus

BEST = settings("small", "best")


@dataclass(frozen=True)
class Options:
    """Compare the learned rule with tuned dynamic evaluation."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of the ordinary language model; its settings are those of every reading."""
    through: tuple[Path, ...] = ()
    """Run folders of the same language model trained through the adaptation: its seeds."""
    ngrams: tuple[Path, ...] = ()
    """The same of one that learned n-gram embeddings, too (`--ngram-embeddings.contexts`)."""
    ngrams_as_usual: tuple[Path, ...] = ()
    """Of one that learned n-gram embeddings without adaptation: what they are worth alone."""
    split: Literal["valid", "test"] = "valid"
    """What is read. `test` is for the end."""
    away: tuple[str, ...] = ()
    """Corpora of another kind, read by the same checkpoints."""
    long: str = ""
    """Corpus of long articles (`benchmarks.unread`), read by one seed: where its gain grows."""
    seeds: int = 3
    """Trainings of the meta-learner."""
    cached_seeds: int = -1
    """Trainings on the ordinary language model that are read with a cache, too; -1 = all."""
    fewer: bool = True
    """Read 2 and 3 levels on the same weights, too."""
    ablate: bool = True
    """Read one seed of the learned rule without the learned basis, too."""
    forms: tuple[Literal["lstm", "published", "all", "same"], ...] = (
        "lstm",
        "published",
        "all",
        "same",
    )
    """Of dynamic evaluation; the best on the tuning words is the rival."""
    dynamic: str = BEST.adapt.dynamic
    """Weights that the meta-learner rewrites."""
    rank: int = BEST.adapt.rank
    """Rank of `.low`; at most the inputs of a matrix: then a change of basis."""
    extensions: Annotated[Extensions, tyro.conf.arg(name="")] = BEST.extensions
    """Those of the learned rule; a language model brings its own n-gram embeddings."""
    segment: int = BEST.adapt.update_every
    """M of the meta-learner."""
    rival_segment: int = 20
    """M of dynamic evaluation: as good as the published 5 in Krause et al.'s own comparison."""
    steps: int = BEST.meta.steps
    """Meta-updates."""
    through_steps: int = 0
    """Those on a language model trained through a learned rule, which starts at that rule."""
    lanes: int = BEST.meta.lanes
    """Articles that meta-training reads side by side."""
    budget: int = 8
    """Steps of training of the meta-learner, or settings of its cache, judged on validation."""
    rival_budget: int = 20
    """Settings of each form of dynamic evaluation, and of its cache, judged there."""
    articles: int = 0
    """Articles to score; 0 = all."""
    only: tuple[str, ...] = ()
    """Make only readings whose names begin so, such as `ordinary/seed 0` or `through`; no tables
    then."""
    resamples: int = 9999
    """Bootstrap resamples of the articles."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's choice."""
    precision: Literal["float32", "bfloat16"] = BEST.adapt.precision
    """Of the factors in the lanes' products, for all rules."""
    out: Path = HOME / "claim"
    """Where tables and pictures go."""


@dataclass(frozen=True)
class Reading:
    """A run of some rules on one of the two language models."""

    where: Path
    name: str
    """Of the language model and of the folder in it: `ordinary/all`."""
    columns: Mapping[str, str]
    """What each of the run's rules is called in the tables."""
    adapt: Mapping[str, Any] = field(default_factory=dict)
    extensions: Extensions | None = None
    """None = those of the ordinary run."""
    seed: int = 0
    budget: int = 0
    """Evaluations on the tuning words; 0 = `Options.budget`."""
    travels: bool = False
    """Whether it reads the corpora of another kind, too."""

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.where / "claim" / self.name.partition("/")[2].replace(" ", "_")

    def config(self, options: Options) -> Config:
        """Settings of its run."""
        base = RunFolder(options.run).load_config()
        there = RunFolder(self.where).load_config()
        lm, extensions = there.lm, self.extensions or base.extensions
        changes: dict[str, Any] = {"ngram_embeddings": there.extensions.ngram_embeddings}
        adapt: dict[str, Any] = {
            "update_every": options.segment,
            "rank": options.rank,
            "precision": options.precision,
        }
        adapt |= self.adapt
        if options.rank < base.model.embedding:  # only a matrix in a basis of its own has them
            changes |= {"word_coupling": WordCoupling(), "intra_segment": IntraSegment()}
            changes["learned_basis"] = LearnedBasis()
        follows = lm.through == "learned"
        steps = options.through_steps if follows else options.steps
        rules = tuple(self.columns)
        trained = tuple(rule for rule in rules if rule in LEARNED)
        if not trained:  # hand-made rules read in no bases of another run
            lm = dataclasses.replace(lm, through="none", through_run=None)
            changes["ngram_embeddings"] = NGramEmbeddings()
        if not trained or follows or not extensions.ngram_memory.enabled:  # or keeps its rule's
            changes["ngram_read_out"] = NGramReadOut()
        evaluation = dataclasses.replace(
            base.evaluation,
            rules=rules,
            protocols=PROTOCOLS,
            split=options.split,
            budget=self.budget or options.budget,
            max_articles=options.articles,
            resamples=options.resamples,
        )
        return validate(
            dataclasses.replace(
                base,
                out=self.path,
                stages=("meta",),
                resume=False,
                overwrite=False,
                threads=options.threads,
                seed=self.seed,
                lm=lm,
                adapt=dataclasses.replace(base.adapt, **adapt),
                meta=dataclasses.replace(
                    base.meta,
                    rules=trained,
                    steps=steps,
                    lanes=options.lanes,
                ),
                evaluation=evaluation,
                extensions=dataclasses.replace(extensions, **changes),
            )
        )


def forms(options: Options) -> dict[str, Reading]:
    """RMS dynamic evaluation: of the LSTM and the softmax bias; of all weights, as published, the
    Fisher without a prior; of all with what the meta-learner has, the prior; of what the
    meta-learner rewrites, as often, in bases that are not learned."""
    rival = {"update_every": options.rival_segment}
    principal = dataclasses.replace(options.extensions, learned_basis=LearnedBasis())
    weights = {
        "lstm": {"dynamic": "lstm,softmax.bias", **rival},
        "published": {"dynamic": "all", "fisher_prior": 0.0, **rival},
        "all": {"dynamic": "all", **rival},
        "same": {"dynamic": options.dynamic},
    }
    return {
        form: Reading(
            options.run,
            f"ordinary/{form}",
            {"rms": f"rms, {form}"},
            adapt,
            principal if form == "same" else None,
            budget=options.rival_budget,
        )
        for form, adapt in weights.items()
        if form in options.forms
    }


def readings(options: Options, chosen: Mapping[str, str]) -> list[Reading]:
    """All that is compared; `chosen` is the rival's form in each protocol."""
    every, found = forms(options), []
    for form, reading in every.items():
        if form in chosen.values():
            cached = {"static" + CACHE: "static" + CACHE, "rms" + CACHE: f"rms, {form}{CACHE}"}
            columns = {**reading.columns, **cached}
            reading = dataclasses.replace(reading, columns=columns, travels=True)
        found.append(reading)
    same, own = {"dynamic": options.dynamic}, options.extensions
    fewer = {f"{levels}_levels": f"{levels}_levels, seed 0" for levels in ("two", "three")}
    if options.fewer:
        found.append(Reading(options.run, "ordinary/fewer levels", fewer, same, own))
    if options.ablate and own.learned_basis.enabled:
        columns = {LEARNED_RULE: f"{LEARNED_RULE}, without learned basis"}
        plain = dataclasses.replace(own, learned_basis=LearnedBasis())
        found.append(Reading(options.run, "ordinary/principal", columns, same, plain))
    models = [("ordinary", "", [options.run] * options.seeds)]
    for model, title in OTHERS.items():
        folders = getattr(options, model)
        models.append((model, title, folders))
        for form in sorted({*chosen.values()}) if folders else ():
            columns = {"rms": f"{title}rms, {form}"}
            changes = {"where": folders[0], "name": f"{model}/{form}", "columns": columns}
            found.append(dataclasses.replace(every[form], **changes))
    for model, title, folders in models:
        for seed, where in enumerate(folders):
            cached = not title and (options.cached_seeds < 0 or seed < options.cached_seeds)
            endings = ("", CACHE) if cached else ("",)
            rules = [LEARNED_RULE + ending for ending in endings]
            columns = {rule: f"{title}{rule}, seed {seed}" for rule in rules}
            if title and not seed:
                columns = {"static": f"{title}static", **columns}
            travels = not title or (not seed and title + LEARNED_RULE not in CONTROLS)
            name = f"{model}/seed {seed}"
            found.append(Reading(where, name, columns, same, own, seed=seed, travels=travels))
    return found


# -- making them --------------------------------------------------------------------------------


def make(reading: Reading, options: Options) -> Run:
    """The reading's run: rules tuned and trained, if they are not yet.

    Raises:
        UserError: training diverged.
    """
    config, path = reading.config(options), reading.path
    run = open_run(config, quiet=True)
    tuned = path.parent / "seed_0"
    prepare(path, language_model(reading.where), tuned if tuned.exists() else None)
    mark, made = identity(run), path / "made.json"
    if _mark(made) != mark:
        say(f"{reading.name}: training")
        for stale in (made, *path.glob("**/evaluation.*"), *path.glob("**/losses.parquet")):
            stale.unlink(missing_ok=True)
        again = RunFolder(path).config_file.exists()
        run_stages(dataclasses.replace(config, resume=again), quiet=True)
        write_text(made, json.dumps({"identity": mark}) + "\n")
    RunFolder(path).save_config(dataclasses.replace(config, stages=("meta", "evaluate")))
    return run


def read(reading: Reading, run: Run, corpus: str) -> LossTable:
    """The losses on a corpus, scored if they are not yet.

    Raises:
        UserError: a loss is not finite.
    """
    split, folder = run.config.evaluation.split, results_folder(run, corpus)
    wanted = {(split, p, rule) for p in PROTOCOLS for rule in reading.columns}
    rows = read_evaluation(folder)
    if not wanted <= {(r["split"], r["protocol"], r["rule"]) for r in rows}:
        say(f"{reading.name}: reading {corpus}, {split}")
        stage_evaluate(run, corpus)
        forget_scores(folder)
    return LossTable.load(folder / "losses.parquet", split)


def _mark(path: Path) -> str | None:
    """What the folder's results were made for."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def rivals(options: Options) -> list[dict[str, Any]]:
    """RMS dynamic evaluation in every form and protocol, tuned, the best of a protocol marked."""
    rows = []
    for form, reading in forms(options).items():
        run = make(reading, options)
        words = run.validation_text(run.config.evaluation.tune_words).words
        for protocol in PROTOCOLS:
            tuned_rule(run, run.base, "rms", protocol)
            known = json.loads((reading.path / "tuning.json").read_text(encoding="utf-8"))
            best = known[f"rms/{protocol}"]["trials"][0]
            rows.append(
                {
                    "form": form,
                    "weights": run.config.adapt.dynamic,
                    "M": run.config.adapt.update_every,
                    "protocol": protocol,
                    "rate": best["rate"],
                    "decay": best["decay"],
                    "word perplexity, tuning words": math.exp(best["nll"] / words),
                    "nll": best["nll"],
                }
            )
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
        for start, ending in (("", ""), ("", CACHE), *((title, "") for title in OTHERS.values())):
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


def _some(options: Options) -> list[Reading]:
    """The readings that --only names; the rival's with its caches once every form is tuned.

    Raises:
        UserError: it names none.
    """
    ready = all((form.path / "made.json").exists() for form in forms(options).values())
    every = readings(options, _chosen(rivals(options)) if ready else {})
    found = [r for r in every if r.name.startswith(options.only)]
    if not found:
        names = ", ".join(r.name for r in every)
        raise UserError(f"--only {' '.join(options.only)}: there are {names}")
    return found


def _read_all(
    every: Sequence[Reading], options: Options, corpora: Sequence[str]
) -> dict[str, list[tuple[Reading, LossTable]]]:
    """Make and score the readings; corpora beyond the first are read by those that travel."""
    found: dict[str, list[tuple[Reading, LossTable]]] = {corpus: [] for corpus in corpora}
    for reading in every:
        run = make(reading, options)
        for corpus in corpora if reading.travels else corpora[:1]:
            found[corpus].append((reading, read(reading, run, corpus)))
    return found


def _read_long(every: Sequence[Reading], options: Options) -> LossTable:
    """The corpus of long articles under the first seed of the learned rule."""
    first = next(reading for reading in every if reading.name == "ordinary/seed 0")
    first = dataclasses.replace(first, columns={LEARNED_RULE: LEARNED_RULE})
    return read(first, open_run(first.config(options), quiet=True), options.long)


def main() -> None:
    """Make what is missing, then the tables and pictures."""
    options = tyro.cli(Options, description=__doc__)
    corpora = (language_model(options.run).load_config().corpus, *options.away)
    if options.only:
        _read_all(_some(options), options, corpora)
        return
    tuned = rivals(options)
    chosen = _chosen(tuned)
    every = readings(options, chosen)
    made = _read_all(every, options, corpora)
    merged = {open_corpus(corpus).name: merge(made[corpus], chosen) for corpus in corpora}
    record("rivals", tuned, options)
    long = _read_long(every, options) if options.long else None
    write_tables(merged, options, chosen, long)


if __name__ == "__main__":
    run_cli(main)
