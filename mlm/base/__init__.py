"""What every room may use: errors for users, atomic files, kept progress, schedule, names."""

from mlm.base.errors import UserError, going_on, interruptible, run_cli, uninterrupted
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
from mlm.base.processes import Ranks, alone, ranks, several_processes
from mlm.base.progress import (
    NOTHING_KEPT,
    Progress,
    Work,
    adam_tensors,
    load_adam,
    saved_by_the_clock,
)
from mlm.base.schedule import cosine

__all__ = [
    "CACHE",
    "EOS",
    "HAND_MADE",
    "LEARNED",
    "NOTHING_KEPT",
    "PROTOCOLS",
    "RULES",
    "RULE_TEXTS",
    "STATIC",
    "LearnedName",
    "Progress",
    "Ranks",
    "RuleText",
    "UserError",
    "Work",
    "adam_tensors",
    "alone",
    "atomic_path",
    "cosine",
    "going_on",
    "interruptible",
    "lazily",
    "load_adam",
    "naming",
    "parse_json",
    "ranks",
    "readable",
    "rule_label",
    "rule_order",
    "rule_texts",
    "run_cli",
    "saved_by_the_clock",
    "several_processes",
    "uninterrupted",
    "write_text",
]
