"""settings.presets"""

from __future__ import annotations

import dataclasses

from mlm.settings.config import Config
from mlm.settings.sections import (
    AdaptConfig,
    EvaluationConfig,
    LMTrainingConfig,
    MetaConfig,
    ModelConfig,
    TextConfig,
)

SMALL = Config(
    preset="small",
    text=TextConfig(vocabulary_size=4000),
    model=ModelConfig(embedding=256, hidden=256),
    lm=LMTrainingConfig(
        epochs=1.0,
        validations=15,
        learning_rate=1e-2,
        dropout_input=0.0,
        dropout_hidden=0.0,
        dropout_output=0.0,
    ),
    adapt=AdaptConfig(fisher_words=100_000, threads=0),
    meta=MetaConfig(lanes=16, steps=30, learning_rate=0.07),
    evaluation=EvaluationConfig(budget=10, tune_words=20_000),
)


BEST = dataclasses.replace(
    SMALL,
    preset="best",
    adapt=dataclasses.replace(
        SMALL.adapt,
        dynamic="softmax.low,lstm.*.input.low,lstm.*.recurrent,bias",
        rank=256,
        related=256,
        basis_words=1_500_000,
        borders=True,
        at_once=True,
        surprise=0.25,
        phrases=32_768,
        segment=64,
        precision="bfloat16",
    ),
    meta=dataclasses.replace(
        SMALL.meta, rules=("four_levels",), lanes=8, steps=32, read_out_words=2_000_000
    ),
    evaluation=dataclasses.replace(SMALL.evaluation, rules=("static", "rms", "four_levels")),
)
"""The rule that gains most (results, `claim`)."""


PRESETS: dict[str, Config] = {
    "pydocs": Config(),
    "small": SMALL,
    "best": BEST,
    "awd": Config(
        preset="awd",
        text=TextConfig(vocabulary="word", vocabulary_size=0),
        model=ModelConfig(embedding=400, hidden=1150, layers=3),
        lm=LMTrainingConfig(
            epochs=40,
            lanes=80,
            segment=70,
            learning_rate=1e-3,
            clip=0.25,
            dropout_embedding=0.1,
            dropout_input=0.65,
            dropout_hidden=0.2,
            dropout_output=0.4,
            weight_drop=0.5,
            ar=2.0,
            tar=1.0,
            validations=40,
            validation_words=0,
        ),
        adapt=AdaptConfig(fisher_words=500_000, threads=0),
        meta=MetaConfig(lanes=16, steps=100, learning_rate=0.07),
        evaluation=EvaluationConfig(budget=12, tune_words=60_000),
    ),
}
