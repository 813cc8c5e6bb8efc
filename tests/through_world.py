"""A small world in which stage 1 goes through a learned rule, and a command that does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from conftest import Finished
from tiny import as_flags
from worlds import EOS

from mlm.experimental.through import ThroughLearned
from mlm.extensions import (
    Extensions,
    IntraSegment,
    NGramEmbeddings,
    NGramMemory,
    SurpriseWeighting,
    WordCoupling,
)
from mlm.extensions.ngram_memory import STEPS
from mlm.extensions.word_coupling import couple
from mlm.models.base import AdaptationBase, fold_low_rank
from mlm.models.recurrent import RecurrentLM
from mlm.rules.family import open_slow, start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import LoadedRule, as_parameters
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, ModelConfig
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank
from mlm.training.language_model import LMTrainer

DYNAMIC = ("softmax.low", "softmax.bias", "lstm.0.input.low", "lstm.0.recurrent", "lstm.0.bias")
SHAPE = RecurrentLM(24, 8, 8, 1)


def text_of_articles(seed: int = 0) -> Text:
    """Every article says three sentences of its own again and again."""
    rng = np.random.default_rng(seed)
    articles = []
    for _ in range(8):
        own = rng.integers(1, 24, (3, 6))
        articles.append(own[rng.integers(0, 3, 30)].ravel())
    return Text(articles, sum(map(len, articles)), EOS)


def through_config(**changes) -> Config:
    lm = {
        "lanes": 4,
        "segment": 10,
        "epochs": 9.0,
        "precision": "float32",
        "byte_noise": 0.0,
        "learning_rate": 0.02,
    }
    lm |= {"dropout_input": 0.0, "dropout_hidden": 0.0, "dropout_output": 0.0}
    embeddings = NGramEmbeddings(contexts=changes.pop("contexts", 0))
    return Config(
        lm=LMTrainingConfig(**{**lm, **changes}),  # type: ignore[arg-type]
        model=ModelConfig(8, 8),
        extensions=Extensions(ngram_embeddings=embeddings),
    )


def as_usual(text: Text | None = None, **changes) -> LMTrainer:
    """Stage 1 without adaptation."""
    read = text or text_of_articles()
    return LMTrainer(through_config(**changes), SHAPE, read, torch.device("cpu"))


def learned_rule_of(intra_segment: bool = True) -> LoadedRule:
    """Gates with two memories, in bases, with word coupling and n-gram memory, for an untrained
    LM."""
    weights = as_usual().model()
    weights = add_low_rank(weights, SHAPE, DYNAMIC, 99, text_of_articles(), 1000)
    random = torch.Generator().manual_seed(0)
    bare = AdaptationBase(SHAPE, weights, DYNAMIC, {}, 3.0, 10)
    weights = couple(bare, torch.randn(24, 3, generator=random) / 4).weights
    rms = {n: torch.rand(weights[n].shape, generator=random) * 0.1 + 0.02 for n in DYNAMIC}
    wanted = Extensions(
        word_coupling=WordCoupling(directions=3),
        intra_segment=IntraSegment(on=intra_segment),
        # steps that are made for wide embeddings
        ngram_memory=NGramMemory(tokens=50, steps=tuple(step / 20 for step in STEPS)),
        surprise_weighting=SurpriseWeighting(share=0.25),
    )
    base = AdaptationBase(SHAPE, weights, DYNAMIC, rms, 3.0, 10, extensions=wanted.enabled())
    base = fold_low_rank(base).derived()
    start = as_parameters({"rate": 0.01, "decay": 0.01}, base)
    rule = LinearGates(per_unit=True, slow=True)
    parameters = start_at(rule, RMS(), start, base)
    open_slow(parameters)
    return LoadedRule(rule, parameters, base)


def through(intra_segment: bool = True, **changes) -> ThroughLearned:
    own = learned_rule_of(intra_segment)
    return ThroughLearned(
        through_config(through="learned", **changes),
        SHAPE,
        text_of_articles(),
        torch.device("cpu"),
        own,
    )


def flags_through(finished: Finished, out: Path) -> list[str]:
    """Stage 1 goes on from the finished run's model, through its first learned rule."""
    config = dataclasses.replace(finished.config, out=out, stages=("lm",))
    lm = dataclasses.replace(
        config.lm,
        epochs=1.0,
        segment=config.adapt.update_every,
        init=finished.folder,
        through="learned",
        through_run=finished.folder,
        dropout_input=0.0,
        dropout_hidden=0.0,
        dropout_output=0.0,
    )
    return as_flags(dataclasses.replace(config, lm=lm))
