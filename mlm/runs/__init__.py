"""A run: its folder opened with its settings, what it was made with, its rules ready to read."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.runs.base import build_base, new_base
    from mlm.runs.rules import Ready, load_learned, ready_rule, ready_rules, tuned_rule
    from mlm.runs.run import Run, open_run

__all__ = [
    "Ready",
    "Run",
    "build_base",
    "load_learned",
    "new_base",
    "open_run",
    "ready_rule",
    "ready_rules",
    "tuned_rule",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "base": "build_base new_base",
        "rules": "Ready load_learned ready_rule ready_rules tuned_rule",
        "run": "Run open_run",
    },
)
