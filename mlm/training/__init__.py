"""Stages 1 and 2: the language model, its Fisher, tuned rules and learned rules."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.training.cache_tuning import tune_cache
    from mlm.training.directions import add_low_rank
    from mlm.training.fisher import estimate_fisher, smooth_fisher
    from mlm.training.judge import validation_gain
    from mlm.training.kept_progress import KeptProgress
    from mlm.training.language_model import LMTrainer, shape_of, train_lm
    from mlm.training.meta import MetaTrainer, train_meta
    from mlm.training.tuning import Trial, TuneText, tune

__all__ = [
    "KeptProgress",
    "LMTrainer",
    "MetaTrainer",
    "Trial",
    "TuneText",
    "add_low_rank",
    "estimate_fisher",
    "shape_of",
    "smooth_fisher",
    "train_lm",
    "train_meta",
    "tune",
    "tune_cache",
    "validation_gain",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "cache_tuning": "tune_cache",
        "directions": "add_low_rank",
        "fisher": "estimate_fisher smooth_fisher",
        "judge": "validation_gain",
        "language_model": "LMTrainer shape_of train_lm",
        "meta": "MetaTrainer train_meta",
        "kept_progress": "KeptProgress",
        "tuning": "Trial TuneText tune",
    },
)
