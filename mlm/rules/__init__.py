"""Medium-term memory: update rules, what a segment's gradient does to a lane's weights."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.rules.family import (
        HAND_MADE_RULES,
        as_gates,
        describe,
        learned_rule,
        open_slow,
        rule_from_description,
        start_at,
    )
    from mlm.rules.gates import Feature, LinearGates
    from mlm.rules.hand_made import RMS, SGD, Adam, HandMade, Momentum
    from mlm.rules.protocol import Bound, LoadedRule, Parameters, Signal, Static, UpdateRule

__all__ = [
    "HAND_MADE_RULES",
    "RMS",
    "SGD",
    "Adam",
    "Bound",
    "Feature",
    "HandMade",
    "LinearGates",
    "LoadedRule",
    "Momentum",
    "Parameters",
    "Signal",
    "Static",
    "UpdateRule",
    "as_gates",
    "describe",
    "learned_rule",
    "open_slow",
    "rule_from_description",
    "start_at",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "family": "HAND_MADE_RULES as_gates describe "
        "learned_rule open_slow rule_from_description start_at",
        "gates": "Feature LinearGates",
        "hand_made": "RMS SGD Adam HandMade Momentum",
        "protocol": "Bound LoadedRule Parameters Signal Static UpdateRule",
    },
)
