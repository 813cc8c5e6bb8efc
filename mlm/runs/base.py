"""The adaptation base of a run: made once after stage 1, then taken from the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from mlm.base.errors import UserError
from mlm.extensions.learned_basis import follow_weights
from mlm.models.base import AdaptationBase, choose_dynamic
from mlm.models.extension import Extension, Making
from mlm.models.language_model import Weights
from mlm.models.recurrent import BaseModel
from mlm.runs.identity import base_identity, base_settings
from mlm.runs.run import Run
from mlm.settings.config import Config
from mlm.settings.flags import flag
from mlm.settings.sections import AdaptConfig
from mlm.store.models import load_lm, save_base
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about
from mlm.training.directions import add_low_rank
from mlm.training.fisher import estimate_fisher
from mlm.training.kept_progress import KeptProgress


def new_base(
    weights: Weights,
    model: BaseModel,
    adapt: AdaptConfig,
    making: Making,
    extensions: Sequence[Extension] = (),
) -> AdaptationBase:
    """theta_0 with the low-rank changes that are asked for, its Fisher, and what extensions make.

    Each of `extensions` is made with those before it, and those of the model, at work.
    """
    dynamic = choose_dynamic(weights, adapt.dynamic)
    text, words, progress = making.text, adapt.fisher_words, making.progress
    weights = add_low_rank(weights, model, dynamic, adapt.rank, text, words, progress)
    base = AdaptationBase(model, weights, dynamic, {}, 0.0, adapt.update_every)
    of_model = tuple(e for e in extensions if e.of_model)
    at_work: tuple[Extension, ...] = ()
    for extension in extensions:
        folded = extension.fold(base, making)
        at_work += () if folded is base else (extension,)
        base = folded
    base = dataclasses.replace(base, extensions=at_work + of_model)
    how = {"quiet": making.quiet, "prior": adapt.fisher_prior, "progress": progress}
    base = estimate_fisher(base, text, words, **how)
    at_work = ()
    for extension in (e for e in extensions if not e.of_model):
        base = dataclasses.replace(base, extensions=at_work + of_model)
        base = extension.make(base, making)
        at_work += (extension,)
    return dataclasses.replace(base, extensions=())


def progress_of(run: Run, stage: str, identity: str, folder: Path | None = None) -> KeptProgress:
    """Where a folder, by default that of checkpoints, keeps how far parts of a stage have come."""
    folder = folder or run.folder.checkpoint(stage).parent
    return KeptProgress(folder, stage, identity, run.config.checkpoint_minutes)


def build_base(run: Run) -> AdaptationBase:
    """The adaptation base, made after stage 1 and kept in the run folder.

    What the folder holds is taken if it was made from the same.
    """
    path, mark = run.folder.checkpoint("memory"), base_identity(run)
    progress = progress_of(run, "memory", mark)
    if made_from(path, mark):
        progress.forget()
        return run.base
    weights, model, _ = load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    weights = {n: w.to(run.device) for n, w in weights.items()}
    making = Making(run.training_text(1), run.training_text(0), run.quiet, progress)
    of_model = tuple(e for e in run.config.extensions.active(weights) if e.of_model)
    extensions = (*run.config.extensions.of_base(), *of_model)
    if run.config.lm.through == "learned":
        base = follow_weights(base_of_through_run(run), weights)
        for extension in extensions:
            base = extension.make(base, making) if extension.of_hidden_states else base
    else:
        base = new_base(weights, model, run.config.adapt, making, extensions)
    made_with = [extension.name for extension in run.config.extensions.of_base()]
    save_base(path, base, run.data.vocabulary.hash, mark, made_with)
    progress.forget()
    return run.ready(base)


def through_run(config: Config, vocabulary_hash: str, device: torch.device) -> Run:
    """The run whose rule stage 1 went through.

    Raises:
        UserError: none is named, it is not there, or it is for another vocabulary.
    """
    path = config.lm.through_run
    if path is None:
        raise UserError(
            "--lm.through learned: name a run folder whose stage 2 is done with --lm.through-run"
        )
    folder = RunFolder(path)
    run = Run(folder.load_config(), folder, device, quiet=True)
    if run.vocabulary.hash != vocabulary_hash:
        raise UserError(f"--lm.through-run {path} belongs to another vocabulary than this text")
    return run


def base_of_through_run(run: Run) -> AdaptationBase:
    """The long-term memory in whose bases the language model was trained.

    Raises:
        UserError: it was made for other settings of adaptation than the run's.
    """
    other = through_run(run.config, run.data.vocabulary.hash, run.device)
    mine, its = (base_settings(r) for r in (run, other))
    names = sorted(n for n in mine.keys() | its.keys() if mine.get(n) != its.get(n))
    differ = [flag(f"adapt.{n}" if hasattr(run.config.adapt, n) else n) for n in names]
    if differ:
        raise UserError(
            f"the language model was trained through the rule of {other.folder.path}, whose "
            f"long-term memory it needs, but {', '.join(differ)} differ from the settings there; "
            "use the same ones"
        )
    return other.folded(other.stored_base)


def made_from(path: Path, mark: str) -> bool:
    """Whether the long-term memory at `path` is whole and made from what `mark` names."""
    try:
        return load_about(path, "").get("identity") == mark
    except UserError:
        return False
