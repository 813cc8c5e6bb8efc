"""What the claim compares: its options, and every reading as an ordinary run's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.claim_tables import CONTROLS, LEARNED_RULE, MEMORY, OTHERS
from benchmarks.output import HOME
from mlm.base.errors import UserError
from mlm.base.names import CACHE, LEARNED, PROTOCOLS
from mlm.extensions import (
    Extensions,
    IntraSegment,
    LearnedBasis,
    NGramEmbeddings,
    NGramReadOut,
    WordCoupling,
)
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.presets import settings
from mlm.store.run_folder import RunFolder

BEST = settings("small", "best")
NONE = Extensions()


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
    valid: bool = False
    """Read the validation articles behind the tuning words, too."""
    seeds: int = 3
    """Trainings of the meta-learner."""
    cached_seeds: int = -1
    """Trainings on the ordinary language model that are read with a cache, too; -1 = all."""
    fewer: bool = True
    """Read 2 and 3 levels on the same weights, too."""
    memory: bool = True
    """Read the rival with the learned rule's n-gram memory, too, tuned with it."""
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
    articles: tuple[int, ...] = (0,)
    """Articles to score, 0 = all: of every text, or of each in turn: the model's own, those of
    --away, that of --valid."""
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
    extensions: Extensions = NONE
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
        lm, extensions = there.lm, self.extensions
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
            max_articles=options.articles[0],
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
            principal if form == "same" else NONE,
            budget=options.rival_budget,
        )
        for form, adapt in weights.items()
        if form in options.forms
    }


def with_memory(options: Options, form: str) -> Reading:
    """A form of RMS dynamic evaluation with the learned rule's n-gram memory, tuned with it; it
    reads the model's own text only."""
    plain, own = forms(options)[form], f"rms, {form}{MEMORY}"
    memory = dataclasses.replace(options.extensions.ngram_memory, hand_made=True)
    return dataclasses.replace(
        plain,
        name=f"ordinary/{form} with n-gram memory",
        columns={"rms": own, "rms" + CACHE: own + CACHE},
        extensions=dataclasses.replace(plain.extensions, ngram_memory=memory),
    )


def memory_readings(options: Options, chosen: Mapping[str, str]) -> list[Reading]:
    """The rival with n-gram memory, if there is any, in the form or forms that are the rival."""
    if not (options.memory and options.extensions.ngram_memory.enabled):
        return []
    return [with_memory(options, form) for form in forms(options) if form in chosen.values()]


def readings(options: Options, chosen: Mapping[str, str]) -> list[Reading]:
    """All that is compared; `chosen` is the rival's form in each protocol."""
    every, found = forms(options), []
    for form, reading in every.items():
        if form in chosen.values():
            cached = {"static" + CACHE: "static" + CACHE, "rms" + CACHE: f"rms, {form}{CACHE}"}
            columns = {**reading.columns, **cached}
            reading = dataclasses.replace(reading, columns=columns, travels=True)
        found.append(reading)
    found += memory_readings(options, chosen)
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


def with_own_settings(options: Options) -> Options:
    """The options with the learned rule's settings as the run trained that rule itself, if it did.

    So the rule that is there stands for seed 0, and other seeds are trained as it was.
    """
    folder = RunFolder(options.run)
    if not folder.checkpoint(LEARNED_RULE).exists():
        return options
    config = folder.load_config()
    return dataclasses.replace(
        options,
        dynamic=config.adapt.dynamic,
        rank=config.adapt.rank,
        extensions=config.extensions,
        segment=config.adapt.update_every,
        steps=config.meta.steps,
        lanes=config.meta.lanes,
        budget=config.evaluation.budget,
        precision=config.adapt.precision,
    )


def articles_of(options: Options, texts: int) -> list[int]:
    """How many articles of each of so many texts are scored; 0 = all.

    Raises:
        UserError: there are neither one number nor as many as texts.
    """
    given = options.articles
    if len(given) not in (1, texts):
        raise UserError(
            f"--articles names {len(given)} numbers for {texts} texts; give one for all of them, "
            "or one for each: the model's own, those of --away, that of --valid"
        )
    return list(given) * texts if len(given) == 1 else list(given)
