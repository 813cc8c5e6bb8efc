"""runs.base"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from mlm.base.errors import UserError
from mlm.extensions.boundaries import learn_borders
from mlm.extensions.related import relate, related_words
from mlm.extensions.warp import followed, learn_bases
from mlm.models.base import AdaptationBase, choose_dynamic, turned
from mlm.models.language_model import Weights
from mlm.models.recurrent import BaseModel
from mlm.runs.identity import _base_settings, base_identity
from mlm.runs.run import Run
from mlm.settings.config import Config
from mlm.settings.sections import AdaptConfig
from mlm.store.models import load_lm, save_base
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank
from mlm.training.fisher import estimate_fisher


def new_base(
    weights: Weights,
    shape: BaseModel,
    adapt: AdaptConfig,
    text: Text,
    quiet: bool = True,
    corpus: Text | None = None,
) -> AdaptationBase:
    """theta_0 with the low-rank changes that are asked for, and its Fisher, from held-out text;
    words are related as in `corpus` (None: that text, too)."""
    dynamic = choose_dynamic(weights, adapt.dynamic)
    weights = add_low_rank(weights, shape, dynamic, adapt.rank, text, adapt.fisher_words)
    if adapt.related:
        found = related_words(corpus or text, shape.vocabulary, adapt.related)
        weights = relate(weights, dynamic, found)
    return estimate_fisher(
        weights,
        shape,
        dynamic,
        text,
        adapt.update_every,
        adapt.fisher_words,
        quiet=quiet,
        prior=adapt.fisher_prior,
    )


def build_base(run: Run) -> AdaptationBase:
    """theta_0 and its Fisher, estimated after stage 1 and kept in the run folder.

    What the folder holds is taken if it was made from the same.
    """
    path, mark = run.folder.checkpoint("memory"), base_identity(run)
    if _made_from(path, mark):
        return run.base
    weights, shape, _ = load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    weights = {n: w.to(run.device) for n, w in weights.items()}
    adapt, text = run.config.adapt, run.training_text(1)
    through = run.config.lm.through == "learned"
    if through:
        base = followed(base_of_through_run(run), weights)
    else:
        corpus = run.training_text(0) if adapt.related else None
        base = new_base(weights, shape, adapt, text, run.quiet, corpus)
    if adapt.borders:  # by the hidden states of this very model
        base = dataclasses.replace(base, borders=learn_borders(shape, weights, text))
    if adapt.basis_words and not through:
        base = dataclasses.replace(turned(base), at_once=adapt.at_once)
        base = learn_bases(base, text, adapt.basis_words, run.quiet)
    save_base(path, base, run.data.vocabulary.hash, mark)
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
    mine, its = (_base_settings(r) for r in (run, other))
    differ = sorted(f"--adapt.{n.replace('_', '-')}" for n in mine if mine[n] != its[n])
    if differ:
        raise UserError(
            f"the language model was trained through the rule of {other.folder.path}, whose "
            f"long-term memory it needs, but {', '.join(differ)} differ from the settings there; "
            "use the same ones"
        )
    return other.base


def _made_from(path: Path, mark: str) -> bool:
    """Whether the long-term memory at `path` is whole and made from what `mark` names."""
    try:
        return load_about(path, "").get("identity") == mark
    except UserError:
        return False
