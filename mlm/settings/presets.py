"""Sizes and rules: what each changes of the settings' defaults. Any size goes with any rule."""

from __future__ import annotations

from typing import Any

from mlm.settings.config import Config
from mlm.settings.flags import leaves, replaced

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "text.vocabulary_size": 4000,
        "model.embedding": 256,
        "model.hidden": 256,
        "lm.epochs": 1.0,
        "lm.validations": 15,
        "lm.learning_rate": 1e-2,
        "lm.dropout_input": 0.0,
        "lm.dropout_hidden": 0.0,
        "lm.dropout_output": 0.0,
        "adapt.fisher_words": 100_000,
        "meta.lanes": 16,
        "meta.steps": 30,
        "meta.learning_rate": 0.07,
        "evaluation.budget": 10,
        "evaluation.tune_words": 20_000,
    },
    "awd": {
        "text.vocabulary": "word",
        "text.vocabulary_size": 0,
        "model.embedding": 400,
        "model.hidden": 1150,
        "model.layers": 3,
        "lm.epochs": 40.0,
        "lm.lanes": 80,
        "lm.segment": 70,
        "lm.learning_rate": 1e-3,
        "lm.clip": 0.25,
        "lm.dropout_embedding": 0.1,
        "lm.dropout_input": 0.65,
        "lm.dropout_hidden": 0.2,
        "lm.dropout_output": 0.4,
        "lm.weight_drop": 0.5,
        "lm.ar": 2.0,
        "lm.tar": 1.0,
        "lm.validations": 40,
        "lm.validation_words": 0,
        "adapt.fisher_words": 500_000,
        "meta.lanes": 16,
        "meta.steps": 100,
        "meta.learning_rate": 0.07,
        "evaluation.budget": 12,
        "evaluation.tune_words": 60_000,
    },
}
"""Settings of a size that are not the defaults, by their places in the tree."""

RULE_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {  # the rule that gains most (results, `claim`), with the effort it was measured with
        "adapt.dynamic": "softmax.low,lstm.*.input.low,lstm.*.recurrent,bias",
        "adapt.rank": 2048,  # full rank in every size
        "adapt.update_every": 64,
        "adapt.precision": "bfloat16",
        "adapt.fisher_words": 100_000,
        "meta.rules": ("four_levels",),
        "meta.lanes": 8,
        "meta.steps": 32,
        "meta.learning_rate": 0.07,
        "evaluation.rules": ("static", "rms", "four_levels"),
        "evaluation.budget": 10,
        "evaluation.tune_words": 20_000,
        "extensions.word_coupling.directions": 256,
        "extensions.boundaries.on": True,
        "extensions.intra_segment.on": True,
        "extensions.learned_basis.words": 1_500_000,
        "extensions.ngram_memory.tokens": 32_768,
        "extensions.ngram_read_out.words": 2_000_000,
        "extensions.surprise_weighting.share": 0.25,
    },
}
"""Settings of a rule that are neither the defaults nor the size's."""

PRESETS = {
    "pydocs": ("tiny", "default"),
    "small": ("small", "default"),
    "best": ("small", "best"),
    "awd": ("awd", "default"),
}
"""Size and rule that one earlier name stands for."""

LATER = ("adapt.", "meta.", "evaluation.")
"""Sections of what comes after stage 1."""


def settings(size: str = "tiny", rule: str = "default") -> Config:
    """The settings of a size with a rule."""
    return replaced(Config(), {"size": size, "rule": rule, **SIZES[size], **RULE_SETTINGS[rule]})


def with_rule(config: Config, rule: str) -> Config:
    """The same language model with another rule, whose settings are those for this size."""
    named = {path for changes in RULE_SETTINGS.values() for path in changes}
    fresh = leaves(settings(config.size, rule))
    own = {p: value for p, value in fresh.items() if p in named or p.startswith(LATER)}
    return replaced(config, {"rule": rule, **own})
