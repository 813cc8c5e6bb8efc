"""Sizes and rules: what each changes of the settings' defaults. Any size goes with any rule."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlm.extensions import (
    Boundaries,
    IntraSegment,
    LearnedBasis,
    NGramMemory,
    NGramReadOut,
    SurpriseWeighting,
    WordCoupling,
)
from mlm.settings.config import Config

Changes = dict[str, dict[str, Any]]
"""New values by section and name."""

SIZES: dict[str, Changes] = {
    "tiny": {},
    "small": {
        "text": {"vocabulary_size": 4000},
        "model": {"embedding": 256, "hidden": 256},
        "lm": {
            "epochs": 1.0,
            "validations": 15,
            "learning_rate": 1e-2,
            "dropout_input": 0.0,
            "dropout_hidden": 0.0,
            "dropout_output": 0.0,
        },
        "adapt": {"fisher_words": 100_000},
        "meta": {"lanes": 16, "steps": 30, "learning_rate": 0.07},
        "evaluation": {"budget": 10, "tune_words": 20_000},
    },
    "awd": {
        "text": {"vocabulary": "word", "vocabulary_size": 0},
        "model": {"embedding": 400, "hidden": 1150, "layers": 3},
        "lm": {
            "epochs": 40.0,
            "lanes": 80,
            "segment": 70,
            "learning_rate": 1e-3,
            "clip": 0.25,
            "dropout_embedding": 0.1,
            "dropout_input": 0.65,
            "dropout_hidden": 0.2,
            "dropout_output": 0.4,
            "weight_drop": 0.5,
            "ar": 2.0,
            "tar": 1.0,
            "validations": 40,
            "validation_words": 0,
        },
        "adapt": {"fisher_words": 500_000},
        "meta": {"lanes": 16, "steps": 100, "learning_rate": 0.07},
        "evaluation": {"budget": 12, "tune_words": 60_000},
    },
}

RULE_SETTINGS: dict[str, Changes] = {
    "default": {},
    "best": {  # the rule that gains most (results, `claim`), with the effort it was measured with
        "adapt": {
            "dynamic": "softmax.low,lstm.*.input.low,lstm.*.recurrent,bias",
            "rank": 2048,  # full rank in every size
            "update_every": 64,
            "precision": "bfloat16",
            "fisher_words": 100_000,
        },
        "meta": {
            "rules": ("four_levels",),
            "lanes": 8,
            "steps": 32,
            "learning_rate": 0.07,
        },
        "evaluation": {
            "rules": ("static", "rms", "four_levels"),
            "budget": 10,
            "tune_words": 20_000,
        },
        "extensions": {
            "word_coupling": WordCoupling(directions=256),
            "boundaries": Boundaries(on=True),
            "intra_segment": IntraSegment(on=True),
            "learned_basis": LearnedBasis(words=1_500_000),
            "ngram_memory": NGramMemory(tokens=32_768),
            "ngram_read_out": NGramReadOut(words=2_000_000),
            "surprise_weighting": SurpriseWeighting(share=0.25),
        },
    },
}

PRESETS = {
    "pydocs": ("tiny", "default"),
    "small": ("small", "default"),
    "best": ("small", "best"),
    "awd": ("awd", "default"),
}
"""Size and rule that one earlier name stands for."""


def settings(size: str = "tiny", rule: str = "default") -> Config:
    """The settings of a size with a rule."""
    config = dataclasses.replace(Config(), size=size, rule=rule)
    for changes in (SIZES[size], RULE_SETTINGS[rule]):
        sections = {
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in changes.items()
        }
        config = dataclasses.replace(config, **sections)
    return config


def with_rule(config: Config, rule: str) -> Config:
    """The same language model with another rule, whose settings are those for this size."""
    fresh = settings(config.size, rule)
    sections = {name for changes in RULE_SETTINGS.values() for name in changes}
    return dataclasses.replace(config, rule=rule, **{n: getattr(fresh, n) for n in sections})
