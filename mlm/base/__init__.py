"""What every room may use: errors for users, atomic files, the learning-rate schedule, names."""

from mlm.base.errors import UserError, run_cli, uninterrupted
from mlm.base.files import atomic_path, naming, parse_json, readable, write_text
from mlm.base.lazy import lazily
from mlm.base.names import (
    CACHE,
    EOS,
    HAND_MADE,
    LEARNED,
    PROTOCOLS,
    RULE_TEXTS,
    RULES,
    STATIC,
    LearnedName,
    RuleText,
    rule_label,
    rule_order,
    rule_texts,
)
from mlm.base.schedule import cosine

__all__ = [
    "CACHE",
    "EOS",
    "HAND_MADE",
    "LEARNED",
    "PROTOCOLS",
    "RULES",
    "RULE_TEXTS",
    "STATIC",
    "LearnedName",
    "RuleText",
    "UserError",
    "atomic_path",
    "cosine",
    "lazily",
    "naming",
    "parse_json",
    "readable",
    "rule_label",
    "rule_order",
    "rule_texts",
    "run_cli",
    "uninterrupted",
    "write_text",
]
