"""What every room may use: errors for users, atomic files, kept progress, schedule, names."""

from mlm.base.errors import UserError, command_of, going_on, note, plain, run_cli, uninterrupted
from mlm.base.files import MARK, atomic_path, leftovers, naming, parse_json, readable, write_text
from mlm.base.kinds import as_kind, kinds, shown, type_problem
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
    "MARK",
    "NOTHING_KEPT",
    "PROTOCOLS",
    "RULES",
    "RULE_TEXTS",
    "STATIC",
    "LearnedName",
    "Progress",
    "RuleText",
    "UserError",
    "Work",
    "adam_tensors",
    "as_kind",
    "atomic_path",
    "command_of",
    "cosine",
    "going_on",
    "kinds",
    "lazily",
    "leftovers",
    "load_adam",
    "naming",
    "note",
    "parse_json",
    "plain",
    "readable",
    "rule_label",
    "rule_order",
    "rule_texts",
    "run_cli",
    "saved_by_the_clock",
    "shown",
    "type_problem",
    "uninterrupted",
    "write_text",
]
