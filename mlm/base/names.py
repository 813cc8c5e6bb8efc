"""base.names"""

from __future__ import annotations

from typing import Literal, get_args

HAND_MADE = ("sgd", "momentum", "rms", "adam")


LearnedRule = Literal[
    "tensor_steps",
    "weight_steps",
    "two_levels",
    "three_levels",
    "unit_steps",
    "four_levels",
    "surprise",
    "adaptive",
    "mlp",
    "lstm",
]


LEARNED: tuple[LearnedRule, ...] = get_args(LearnedRule)


RULES = ("static", *HAND_MADE, *LEARNED)


CACHE = "+cache"
"""Ending of a rule's name that stands for the rule with a neural cache on top."""


PROTOCOLS = ("article", "stream")
