"""What is tried and not settled: the core does not know it."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.experimental.through import ThroughLearned, ThroughRMS, ThroughTrainer

__all__ = [
    "ThroughLearned",
    "ThroughRMS",
    "ThroughTrainer",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "through": "ThroughLearned ThroughRMS ThroughTrainer",
    },
)
