"""The stages of a run, one after another, each from what the run folder holds."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.runs.base import build_base, new_base
    from mlm.runs.evaluate import evaluate_run, stage_evaluate
    from mlm.runs.language_model import stage_lm
    from mlm.runs.meta import stage_meta
    from mlm.runs.rules import Ready, load_learned, ready_rule, ready_rules, tuned_rule
    from mlm.runs.run import Run, open_run
    from mlm.runs.stages import run_stages

__all__ = [
    "Ready",
    "Run",
    "build_base",
    "evaluate_run",
    "load_learned",
    "new_base",
    "open_run",
    "ready_rule",
    "ready_rules",
    "run_stages",
    "stage_evaluate",
    "stage_lm",
    "stage_meta",
    "tuned_rule",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "base": "build_base new_base",
        "evaluate": "evaluate_run stage_evaluate",
        "language_model": "stage_lm",
        "meta": "stage_meta",
        "rules": "Ready load_learned ready_rule ready_rules tuned_rule",
        "run": "Run open_run",
        "stages": "run_stages",
    },
)
