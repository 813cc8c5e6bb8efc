"""The stages of a run, one after another, each from what the run folder holds."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.stages.evaluate import evaluate_run, stage_evaluate
    from mlm.stages.language_model import stage_lm
    from mlm.stages.meta import stage_meta
    from mlm.stages.order import run_stages

__all__ = ["evaluate_run", "run_stages", "stage_evaluate", "stage_lm", "stage_meta"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "evaluate": "evaluate_run stage_evaluate",
        "language_model": "stage_lm",
        "meta": "stage_meta",
        "order": "run_stages",
    },
)
