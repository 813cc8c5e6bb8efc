"""The flags of every script: one name for a setting, wherever it is set.

What users set has short names, in the order of `--help`. All other settings are research settings:
their flags are their places in the tree of settings, such as `--meta.unroll`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

GROUPS: dict[str, dict[str, str]] = {
    "run": {
        "corpus": "corpus",
        "out": "out",
        "size": "size",
        "rule": "rule",
        "stages": "stages",
        "resume": "resume",
        "overwrite": "overwrite",
        "device": "device",
        "threads": "threads",
        "memory-gb": "memory_gb",
        "seed": "seed",
        "checkpoint-minutes": "checkpoint_minutes",
    },
    "text and language model (stage 1)": {
        "vocabulary": "text.vocabulary",
        "vocabulary-size": "text.vocabulary_size",
        "train-words": "text.train_words",
        "cell": "model.cell",
        "embedding": "model.embedding",
        "hidden": "model.hidden",
        "layers": "model.layers",
        "epochs": "lm.epochs",
        "lanes": "lm.lanes",
        "learning-rate": "lm.learning_rate",
    },
    "adaptation while reading (stage 2)": {
        "dynamic": "adapt.dynamic",
        "rank": "adapt.rank",
        "update-every": "adapt.update_every",
        "train-rules": "meta.rules",
        "meta-steps": "meta.steps",
    },
    "scoring": {
        "rules": "evaluation.rules",
        "protocols": "evaluation.protocols",
        "split": "evaluation.split",
        "max-articles": "evaluation.max_articles",
        "top-k": "evaluation.top_k",
        "budget": "evaluation.budget",
        "draw": "draw",
    },
}
"""Flags that users set: group, name, place in the tree of settings."""

SHORT = {path: f"--{name}" for group in GROUPS.values() for name, path in group.items()}

UNGROUPED = "extensions."
"""The sections below it are named without it."""

EARLIER = {"--adapt.segment": "--update-every"}
"""Earlier names of flags whose setting has another name, too."""


def _long(path: str) -> str:
    return "--" + path.removeprefix(UNGROUPED).replace("_", "-")


def flag(path: str) -> str:
    """The flag of the setting at `path`, such as `lm.epochs`."""
    return SHORT.get(path) or _long(path)


def aliases() -> dict[str, str]:
    """Flags under which a setting could be set earlier, and its flag now."""
    return {_long(path): name for path, name in SHORT.items() if _long(path) != name} | EARLIER


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The values of a tree of settings by their paths."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(tree):
        value, here = getattr(tree, field.name), f"{path}{field.name}"
        nested = dataclasses.is_dataclass(value)
        found |= leaves(value, f"{here}.") if nested else {here: value}
    return found


def replaced(tree: Any, values: dict[str, Any]) -> Any:
    """The tree of settings with other values at some paths."""
    changes: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = value
        else:
            changes[name] = value
    for name, inner in below.items():
        changes[name] = replaced(getattr(tree, name), inner)
    return dataclasses.replace(tree, **changes)
