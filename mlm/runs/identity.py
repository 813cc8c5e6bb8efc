"""Hashes of what a result of stage 2 depends on: a changed one is not reused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mlm.models.base import has_low_rank
from mlm.models.extension import Extension
from mlm.runs.run import Run
from mlm.settings.record import to_dict
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about
from mlm.store.versions import constants

FIRST_ORDER = ("reverse", "checkpoint", "forward")


def identity(run: Run, learned: bool = True) -> str:
    """Hash of what a stage-2 result depends on.

    `learned`: what is learned matters; hand-made rules depend neither on it nor on the seed.
    """
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text", "adapt", "meta", "evaluation", "seed")}
    for name in ("rules", "protocols", "split", "lanes", "max_articles", "resamples"):
        keys["evaluation"].pop(name)
    keys["adapt"].pop("kernels")  # how it is computed; results agree to rounding
    if keys["meta"]["gradient"] in FIRST_ORDER:
        keys["meta"].pop("gradient")
    if not learned:
        for name in ("meta", "seed"):
            keys.pop(name)
    enabled = run.config.extensions.enabled()
    keys["extensions"] = _fingerprints(enabled if learned else run.config.extensions.of_base())
    return _hash(run, keys)


def _fingerprints(extensions: tuple[Extension, ...]) -> dict[str, Any]:
    """Settings and constants; those of the model are in its file's hash."""
    return {e.name: e.fingerprint() for e in extensions if not e.of_model}


def base_identity(run: Run) -> str:
    """Hash of what the adaptation base depends on."""
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text")} | {"adapt": base_settings(run)}
    return _hash(run, keys)


def base_settings(run: Run) -> dict[str, Any]:
    """Settings that the adaptation base depends on, by name."""
    adapt = to_dict(run.config.adapt)
    for name in ("kernels", "guard"):
        adapt.pop(name)
    return adapt | _fingerprints(run.config.extensions.of_base())


def _hash(run: Run, keys: dict[str, Any]) -> str:
    """Of settings, without those that are not in use, and the language model."""
    if not has_low_rank(run.config.adapt.dynamic):
        keys["adapt"].pop("rank")
    if keys["adapt"]["precision"] == "float32":
        keys["adapt"].pop("precision")
    if run.config.lm.through == "learned" and run.config.lm.through_run is not None:
        other = RunFolder(run.config.lm.through_run).checkpoint("memory")
        keys["through"] = load_about(other, "make it first (`--stages meta`)").get("identity")
    keys["constants"] = constants(of_model=False, tensors=())
    path = run.folder.checkpoint("lm")
    weights = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    return hashlib.sha256(json.dumps([keys, weights]).encode()).hexdigest()[:16]
