"""What must hold before the first stage begins: every later refusal that can be foreseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlm.base.errors import UserError
from mlm.base.files import write_text
from mlm.base.names import CACHE, HAND_MADE, LEARNED
from mlm.base.processes import ranks
from mlm.base.terminal import note
from mlm.models.base import choose_dynamic, has_low_rank
from mlm.models.low_rank import folds
from mlm.rules.family import HAND_MADE_RULES, rule_from_description
from mlm.runs.base import base_of_through_run
from mlm.runs.rules import rule_to_train
from mlm.runs.run import Run
from mlm.settings.checks import extension_problems, plan_of
from mlm.settings.config import Config
from mlm.settings.flags import flag, leaves
from mlm.stages.language_model import rule_of_through_run
from mlm.store.lock import check_writable
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import entry, load_about
from mlm.text.corpora import open_corpus
from mlm.text.tokens import TokenFile, encode_split, shared_articles
from mlm.training.language_model import shape_of, weights_of_run

HOW = (
    *("corpus", "resume", "overwrite", "out", "stages", "device", "threads", "memory_gb"),
    *("checkpoint_minutes", "text.data_dir"),
)
"""Settings that say where and how to compute, not what: the text counts by its content."""

REMEDIES = ("lm.learning_rate", "lm.precision", "lm.through_rate")
"""Settings that a message advises to change before a run goes on; the change is recorded."""


def check_folder(run: Run) -> None:
    """Nothing is written over another run unasked, and no stage starts without what it needs.

    Raises:
        UserError: the folder is a file, holds a run already, or lacks one to go on with.
    """
    folder, config, fresh = run.folder, run.config, run.fresh
    path = folder.path
    check_writable(path)
    if folder.released:
        raise UserError(
            f"--out {path} holds a released model, which is only read; choose another folder"
        )
    if config.resume and not folder.config_file.exists():
        raise UserError(
            f"--resume: {path} holds no run to continue. Leave --resume out to start one, or name "
            "its folder with --out"
        )
    if "lm" in config.stages and not (config.resume or config.overwrite) and folder.results():
        raise UserError(
            f"{path} already holds a run. Continue it with --resume, replace it with "
            "--overwrite, or choose another folder with --out"
        )
    if not fresh and folder.config_file.exists():
        _check_recorded(config, folder)
        folder.rows()
    trained = set(config.meta.rules) if "meta" in config.stages else set()
    others = {"lm.init": config.lm.init, "lm.through_run": config.lm.through_run}
    for place, other in others.items():
        if fresh and other is not None and other.resolve() == path.resolve():
            raise UserError(
                f"{flag(place)} {other} is the run folder itself; name another one with --out"
            )
    needs = {
        "meta": (folder.checkpoint("lm"), {"lm"}),
        "evaluate": (folder.checkpoint("memory"), {"meta"}),
        "draw": (path / "losses.parquet", {"evaluate"}),
    }
    for stage in config.stages:
        file, makers = needs.get(stage, (path, {stage}))
        if not makers & set(config.stages) and (fresh or not file.exists()):
            raise UserError(
                f"--stages {stage}: {file} is missing; run --stages {' '.join(makers)} first"
            )
    scored = [rule.removesuffix(CACHE) for rule in config.evaluation.rules]
    for name in scored if "evaluate" in config.stages else ():
        known = name in trained or (not fresh and folder.checkpoint(name).exists())
        if name in LEARNED and not known:
            raise UserError(
                f"--rules: {name} is not trained in this run; add it to --train-rules "
                "(with --stages meta), or leave it out"
            )


def _check_recorded(config: Config, folder: RunFolder) -> None:
    """Settings of a language model that is there, and all of a run that goes on, are its own.

    Raises:
        UserError: names the flags that say otherwise.
    """
    mine, its = leaves(config), leaves(folder.load_config())
    own = ("size", "text.", "model.", "lm.", "extensions.ngram_embeddings.")
    differ = [
        f"{flag(path)} {its[path]}"
        for path in mine
        if _place(mine[path]) != _place(its[path])
        and path not in (*HOW, "lm.through_run")  # a folder may have moved
        and (path not in REMEDIES if config.resume else path.startswith(own))
    ]
    if differ and config.resume:
        raise UserError(
            f"--resume goes on with the run's own settings, and {folder.path} was made with "
            f"{', '.join(differ)}. Leave these flags out, or, to make later stages anew, name them "
            "with --stages and without --resume"
        )
    if differ:
        raise UserError(
            f"the language model in {folder.path} was made with {', '.join(differ)}. Leave these "
            "flags out, or train another one with --stages lm and another --out"
        )


def _place(value: Any) -> Any:
    """A setting; a path as it is found from everywhere."""
    return value.resolve() if isinstance(value, Path) else value


def check_text(run: Run) -> None:
    """Text that a later stage would refuse is refused before the first.

    Raises:
        UserError: too few articles, none as long as M, or none to score.
    """
    config = run.config
    run.training_text(0)
    run.validation_text(config.lm.validation_words)
    tell_shared(run, "valid", run.data.splits["valid"])
    if "meta" in config.stages:
        longest = max(len(article) for article in run.training_text(1).articles)
        every = config.adapt.update_every
        if longest < every:
            raise UserError(
                f"--update-every {every}: no held-out article is as long; the longest has "
                f"{longest} tokens. Use a smaller M, more text, or a larger --text.held-out"
            )
    if "evaluate" in config.stages:
        split, cache = config.evaluation.split, config.text.data_dir
        source, vocabulary = open_corpus(config.corpus), run.data.vocabulary
        file = encode_split(source, split, vocabulary, cache, progress=not run.quiet)
        if not any(file.words[: config.evaluation.max_articles or None]):
            raise UserError(
                f"{config.corpus}, split {split}: no article with a word in it; check the corpus"
            )
        tell_shared(run, split, file)


def tell_shared(run: Run, split: str, file: TokenFile) -> None:
    """A note if articles of a split stand in the training text, too."""
    try:
        shared = shared_articles(file, run.data.splits["train"])
    except UserError:  # the training text is not here
        return
    if shared and split != "train":
        note(
            f"{len(shared)} of the {len(file)} articles of split {split} stand in the training "
            f"text, too, such as {shared[0]!r}: numbers on them show what was learned by heart. "
            "Remove them from one of both"
        )


def check_plan(run: Run) -> None:
    """What the settings ask of the model, and of other runs, is there.

    Raises:
        UserError: no weight of the name that adapts; a rule, a start or another run that does not
            fit.
    """
    config, data = run.config, run.data
    shape = shape_of(config, data.vocabulary.size)
    through = config.lm.through
    _check_processes(run)
    if "lm" in config.stages:
        begun = config.resume and run.folder.checkpoint("lm_last").exists()
        if config.lm.init is not None and not begun:
            weights_of_run(RunFolder(config.lm.init), shape, data.vocabulary.hash)
        if through == "rms":
            if has_low_rank(config.adapt.dynamic):
                raise UserError(
                    "--lm.through rms trains full matrices only; leave .low out of --dynamic"
                )
            choose_dynamic(shape.layout(), config.adapt.dynamic)
        elif through == "learned":
            rule_of_through_run(config, shape, data.vocabulary.hash, run.device)
    if "meta" in config.stages:
        dynamic = choose_dynamic(shape.layout(), config.adapt.dynamic)
        sizes = {name: size for name, (size, _) in shape.layout().items()}
        folded = folds(sizes, dynamic, config.adapt.rank)
        problems = extension_problems(plan_of(config, dynamic, folded))
        if problems:
            raise UserError("; ".join(problems))
        if through == "learned":
            base_of_through_run(run)
        _check_rules(run, dynamic)


def _check_processes(run: Run) -> None:
    """There is something to do for every process.

    Raises:
        UserError: there are fewer lanes, or stage 1 cannot be shared.
    """
    config = run.config
    if "lm" in config.stages and config.lm.through != "none" and ranks().world > 1:
        raise UserError(
            f"--lm.through {config.lm.through} trains in one process only; start it without "
            "torchrun, and go on with several processes after stage 1"
        )
    if "lm" in config.stages:
        ranks().share_lanes(min(config.lm.lanes, len(run.training_text(0).articles)), "lm")
    if "meta" in config.stages and config.meta.rules:
        ranks().share_lanes(config.meta.lanes, "meta")


def _check_rules(run: Run, dynamic: tuple[str, ...]) -> None:
    """The rules to train can start as asked, and those to score that are there already fit.

    Raises:
        UserError: one cannot be trained so, or is missing, or is for other weights.
    """
    meta, stages = run.config.meta, run.config.stages
    start = None
    if run.config.lm.through == "learned":
        pass  # the rule of that run, which has been looked at
    elif meta.start in HAND_MADE:
        start = HAND_MADE_RULES[meta.start]
    elif meta.rules:
        path = run.folder.checkpoint(meta.start)
        if run.fresh or not path.exists():
            raise UserError(
                f"--meta.start {meta.start}: this rule is not trained in {run.folder.path} yet; "
                f"train it first (--stages meta --train-rules {meta.start}), or start from "
                f"{', '.join(HAND_MADE)}"
            )
        start = rule_from_description(meta.start, _about(run, meta.start, dynamic)["rule"])
    for name in meta.rules if start is not None else ():
        assert start is not None
        rule_to_train(meta, name, start)
    scored = {rule.removesuffix(CACHE) for rule in run.config.evaluation.rules} & set(LEARNED)
    for name in scored - set(meta.rules) if "evaluate" in stages else ():
        _about(run, name, dynamic)


def _about(run: Run, name: str, dynamic: tuple[str, ...]) -> dict[str, Any]:
    """The description of a trained rule.

    Raises:
        UserError: it is missing, damaged, or for other dynamic weights.
    """
    path = run.folder.checkpoint(name)
    about = load_about(path, "train the meta-learner first (`--stages meta`)")
    its = entry(path, about, "dynamic", tuple[str, ...])
    entry(path, about, "rule", dict)
    if set(its) != set(dynamic):
        raise UserError(
            f"{path} was trained for the weights {', '.join(its)}, but those that "
            f"adapt now are {', '.join(dynamic)}; train it again (--train-rules {name}), or leave "
            "it out"
        )
    return about


def remove_results(run: Run) -> None:
    """Remove what an earlier run left, so that no file of one model stands beside another's."""

    def remove() -> None:
        for file in run.folder.results():
            file.unlink()
        write_text(run.folder.metrics_file, "")

    ranks().on_first(remove)
