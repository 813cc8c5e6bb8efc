"""Settings of a run: one frozen tree with defaults, presets and checks, and its record."""

from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.presets import PRESETS
from mlm.settings.record import from_dict, to_dict
from mlm.settings.sections import (
    AdaptConfig,
    EvaluationConfig,
    LMTrainingConfig,
    MetaConfig,
    ModelConfig,
    TextConfig,
)

__all__ = [
    "PRESETS",
    "AdaptConfig",
    "Config",
    "EvaluationConfig",
    "LMTrainingConfig",
    "MetaConfig",
    "ModelConfig",
    "TextConfig",
    "from_dict",
    "to_dict",
    "validate",
]
