"""Stage 1: the language model, by the trainer that the settings name."""

from __future__ import annotations

import dataclasses

import torch

from mlm.base.errors import UserError
from mlm.base.processes import ranks
from mlm.base.progress import reuse_memory
from mlm.base.terminal import detail
from mlm.experimental.through import ThroughLearned, ThroughRMS, ThroughTrainer
from mlm.models.recurrent import BaseModel
from mlm.rules.protocol import LoadedRule
from mlm.runs.base import through_run
from mlm.runs.identity import lm_identity
from mlm.runs.rules import load_learned
from mlm.runs.run import Run
from mlm.settings.config import Config
from mlm.text.streams import Text
from mlm.training.language_model import LMTrainer, shape_of, train_lm


def stage_lm(run: Run) -> None:
    """Stage 1: the static language model."""
    reuse_memory()
    seed = run.folder.seed_of("lm") if run.config.resume else None
    if seed not in (None, run.config.seed):  # later stages may have had another
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, seed=seed))
    vocabulary = run.data.vocabulary
    shape = shape_of(run.config, vocabulary.size)
    text = run.training_text(0)
    valid = run.validation_text(run.config.lm.validation_words)
    if not (run.config.resume and run.folder.checkpoint("lm_last").exists()):
        ranks().on_first(lambda: vocabulary.save(run.folder.vocabulary))
    detail(
        f"{text.words:,} words ({text.tokens:,} tokens) in {len(text.articles):,} articles, "
        f"vocabulary {vocabulary.size:,}, {shape.size:,} weights"
    )
    if run.config.lm.through == "none":
        trainer = LMTrainer(run.config, shape, text, run.device)
    else:
        trainer = through_trainer(run.config, shape, text, vocabulary.hash, run.device)
    folder = dataclasses.replace(run.folder, mark=lm_identity(run))
    train_lm(trainer, run.config, valid, folder, vocabulary.hash, run.quiet)
    perplexity = valid.word_perplexity(trainer.best)
    detail(f"perplexity {perplexity:.1f} per word on {valid.words:,} words of validation")


def through_trainer(
    config: Config, shape: BaseModel, text: Text, vocabulary_hash: str, device: torch.device
) -> ThroughTrainer:
    """The trainer that --lm.through names.

    Raises:
        UserError: --lm.through-run holds no rule, or one for another vocabulary or other sizes.
    """
    if config.lm.through == "rms":
        return ThroughRMS(config, shape, text, device)
    learned = rule_of_through_run(config, shape, vocabulary_hash, device)
    return ThroughLearned(config, shape, text, device, learned)


def rule_of_through_run(
    config: Config, shape: BaseModel, vocabulary_hash: str, device: torch.device
) -> LoadedRule:
    """The learned rule that stage 1 goes through.

    Raises:
        UserError: --lm.through-run holds no rule, or one for another vocabulary or other sizes.
    """
    run = through_run(config, vocabulary_hash, device)
    path, other = run.folder.path, run.config
    if not other.meta.rules:
        raise UserError(f"--lm.through-run {path}: no rule was learned there (--train-rules)")
    base = run.base
    if base.model != shape:
        raise UserError(
            f"--lm.through-run {path}: its model is {base.model}, but the settings say {shape}; "
            "use the same --model.* settings"
        )
    if other.adapt.update_every != config.lm.segment:
        raise UserError(
            f"--lm.through-run {path} reads {other.adapt.update_every} tokens per update; use "
            f"--lm.segment {other.adapt.update_every}"
        )
    return load_learned(run, other.meta.rules[0], base)
