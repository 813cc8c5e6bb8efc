"""Names of rules and protocols, in files, in flags and for readers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple, get_args

from mlm.base.errors import UserError

EOS = "<eos>"
"""A line end, as a word."""


STATIC = "static"


HAND_MADE = ("sgd", "momentum", "rms", "adam")


LearnedName = Literal[
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


LEARNED: tuple[LearnedName, ...] = get_args(LearnedName)


RULES = (STATIC, *HAND_MADE, *LEARNED)


BEST = "best"
"""Stands for the learned rule of a model that gained most on validation."""


CACHE = "+cache"
"""Ending of a rule's name that stands for the rule with a neural cache on top."""


PROTOCOLS = ("article", "stream")


def check_rules(rules: Iterable[str], hint: str = "") -> None:
    """Refuse what is no name of a rule that a model can be asked for.

    Args:
        hint: what the message ends with.

    Raises:
        UserError: the first name that is neither `BEST` nor a rule's, with or without a cache.
    """
    for rule in rules:
        if rule.removesuffix(CACHE) not in (BEST, *RULES):
            raise UserError(
                f"no rule {rule!r}; choose from {', '.join((BEST, *RULES))}, each also with "
                f"{CACHE}{hint}"
            )


class RuleText(NamedTuple):
    """How a rule is shown to readers."""

    label: str
    """Its name in every table, legend and picture."""
    about: str
    """What it does and where it comes from, in one line."""


RULE_TEXTS = {
    STATIC: RuleText("static", "the trained model; no weight changes"),
    "sgd": RuleText("SGD dynamic evaluation", "a step against the gradient (Mikolov et al. 2010)"),
    "momentum": RuleText(
        "momentum dynamic evaluation",
        "a gradient with momentum, decay to theta_0 (Behrouz et al. 2025, eqs. 9 to 13)",
    ),
    "rms": RuleText(
        "RMS dynamic evaluation",
        "steps over the RMS gradient, decay to theta_0 (Krause et al. 2018, eqs. 5 to 8)",
    ),
    "adam": RuleText(
        "Adam-like dynamic evaluation",
        "RMS with running moments of the gradient (Kingma and Ba 2015, algorithm 1)",
    ),
    "tensor_steps": RuleText(
        "learned steps per tensor",
        "a learned step size and decay per tensor (Li et al. 2017, coarser)",
    ),
    "weight_steps": RuleText(
        "learned steps per weight",
        "a learned step size per weight (Meta-SGD, Li et al. 2017, eq. 5)",
    ),
    "two_levels": RuleText(
        "2 levels", "COPY and UPDATE gates, no FLUSH (Wolf et al. 2018, eq. 6 with z = 0)"
    ),
    "three_levels": RuleText("3 levels", "COPY, UPDATE and FLUSH gates (Wolf et al. 2018, eq. 6)"),
    "unit_steps": RuleText(
        "3 levels, steps per row and column",
        "3 levels and a learned step size per row and column of every weight matrix",
    ),
    "four_levels": RuleText(
        "4 levels",
        "3 levels, steps per row and column, in a fast and a slow memory (Hinton and Plaut 1987)",
    ),
    "surprise": RuleText(
        "3 levels with momentum", "3 levels on a learned momentum (Behrouz et al. 2025, eq. 10)"
    ),
    "adaptive": RuleText(
        "3 levels with momentum and second moment",
        "3 levels on learned running moments: a learned Adam (Kingma and Ba 2015)",
    ),
    "mlp": RuleText(
        "3 levels, MLP gates",
        "3 levels and a network shared by all weights (Metz et al. 2019)",
    ),
    "lstm": RuleText(
        "3 levels, LSTM gates",
        "3 levels and an LSTM with a state per weight (Andrychowicz et al. 2016)",
    ),
}
"""Known rules in the order of tables and legends; any other name is shown after them."""


CACHE_TEXT = RuleText(
    "neural cache", "a cache of recent hidden states and words (Grave et al. 2017)"
)
"""Of `static+cache`, and of what `+cache` adds to another rule."""


def rule_label(rule: str) -> str:
    """Return the name of `rule` for readers."""
    base = rule.removesuffix(CACHE)
    if base == STATIC and rule != base:
        return CACHE_TEXT.label
    label = RULE_TEXTS[base].label if base in RULE_TEXTS else base.replace("_", " ")
    return label if rule == base else f"{label} + cache"


def rule_texts(rules: Collection[str]) -> list[RuleText]:
    """Return what explains these rules to readers, each known part of them once, in order."""
    bases = {rule.removesuffix(CACHE) for rule in rules}
    known = [text for name, text in RULE_TEXTS.items() if name in bases]
    return [*known, CACHE_TEXT] if any(rule.endswith(CACHE) for rule in rules) else known


def rule_order(rule: str) -> tuple[int, str]:
    """Sort key: known rules first, in the order of `RULE_TEXTS`, then the others by name."""
    known, base = list(RULE_TEXTS), rule.removesuffix(CACHE)
    return (known.index(base) if base in known else len(known), rule)
