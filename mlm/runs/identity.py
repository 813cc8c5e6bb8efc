"""Hashes of what a result depends on, by content: one of other content is not reused.

The text counts by its content, a model or a rule by the checksum of its file, and settings by their
values; paths do not count. The chain: text and settings -> language model (its file) -> base (file)
-> tuned settings, learned rules (files) -> rows of an evaluation. Every link holds the identity of
what it was made from, so that what is stale is found wherever it lies.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mlm.extensions import Extensions
from mlm.models.base import has_low_rank
from mlm.models.extension import Extension, numbers_of
from mlm.reading import step
from mlm.rules.family import HAND_MADE_RULES
from mlm.runs.run import Run, in_bfloat16
from mlm.settings.record import to_dict
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import CHECKSUM, load_about
from mlm.store.versions import constants

FIRST_ORDER = ("auto", "reverse", "checkpoint", "forward")


def lm_identity(run: Run) -> str:
    """Hash of what the language model depends on."""
    config = to_dict(run.config)
    keys = {name: config[name] for name in ("text", "model", "lm", "seed")}
    keys["text"].pop("data_dir")
    for name in ("init", "through_run"):
        keys["lm"].pop(name)
    return _hash({**keys, "of": run.text_marks, "constants": constants(of_model=True)})


def base_identity(run: Run) -> str:
    """Hash of what the adaptation base depends on."""
    path = run.folder.checkpoint("lm")
    keys = {
        "text": [run.text_marks[name] for name in ("vocabulary", "train")],
        "held_out": run.config.text.held_out,
        "lm": checkpoint_mark(run.folder, "lm") if path.exists() else "",
        "adapt": base_settings(run),
        "constants": constants(of_model=False),
    }
    if run.config.lm.through == "learned" and run.config.lm.through_run is not None:
        keys["through"] = checkpoint_mark(RunFolder(run.config.lm.through_run), "memory")
    return _hash(keys)


def identity(run: Run, learned: bool = True) -> str:
    """Hash of what a stage-2 result depends on.

    `learned`: what is learned matters; hand-made rules depend neither on it nor on the seed.
    """
    config = to_dict(run.config)
    keys = {name: config[name] for name in ("meta", "evaluation", "seed")}
    for name in ("rules", "protocols", "split", "lanes", "max_articles", "resamples", "top_k"):
        keys["evaluation"].pop(name)
    if keys["meta"]["gradient"] in FIRST_ORDER:
        keys["meta"].pop("gradient")
    if not learned:
        for name in ("meta", "seed"):
            keys.pop(name)
    extensions = run.config.extensions
    seen = extensions.enabled() if learned else _of_hand_made(extensions)
    keys["extensions"] = _fingerprints(seen)
    keys |= {"base": base_identity(run), "guard": run.config.adapt.guard}
    return _hash({**keys, "valid": run.text_marks["valid"]})


def row_identity(run: Run, rule: str, setting: Any) -> str:
    """Hash of what the losses of a rule depend on, besides the text that is read.

    Args:
        setting: tuned settings, or the mark of a learned rule's file.
    """
    keys = {
        "base": checkpoint_mark(run.folder, "memory"),
        "rule": [rule, setting],
        "guard": guard_mark(run),
        "bfloat16": in_bfloat16(run.config.adapt),
        "extensions": _fingerprints(run.config.extensions.enabled()),
        "constants": constants(of_model=False),
    }
    return _hash(keys)


def guard_mark(run: Run) -> list[Any]:
    """What the guard does while lanes read: its setting and its constants."""
    return [run.config.adapt.guard, numbers_of(step)]


def checkpoint_mark(folder: RunFolder, name: str) -> str:
    """The checksum of a checkpoint: what is made from it is for no other.

    Raises:
        UserError: it is missing or damaged.
    """
    return load_about(folder.checkpoint(name), "run its stage first")[CHECKSUM]


def base_settings(run: Run) -> dict[str, Any]:
    """Settings that the adaptation base depends on, by name."""
    adapt = to_dict(run.config.adapt)
    for name in ("kernels", "guard"):  # how it is computed; what is done while reading
        adapt.pop(name)
    if not has_low_rank(run.config.adapt.dynamic):
        adapt.pop("rank")
    if adapt["precision"] == "float32":
        adapt.pop("precision")
    return adapt | _fingerprints(run.config.extensions.of_base())


def _of_hand_made(extensions: Extensions) -> tuple[Extension, ...]:
    """Those that the base depends on, and others that hand-made rules read with."""
    base = extensions.of_base()
    rules = HAND_MADE_RULES.values()
    others = (e for e in extensions.enabled() if e not in base)
    return (*base, *(e for e in others if any(e.applies_to(rule) for rule in rules)))


def _fingerprints(extensions: tuple[Extension, ...]) -> dict[str, Any]:
    """Settings and constants; those of the model are in its file's hash."""
    return {e.name: e.fingerprint() for e in extensions if not e.of_model}


def _hash(keys: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]
