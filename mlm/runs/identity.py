"""runs.identity"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mlm.models.base import has_low_rank
from mlm.runs.run import Run
from mlm.settings.record import to_dict
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about

FIRST_ORDER = ("reverse", "checkpoint", "forward")


def identity(run: Run, learned: bool = True) -> str:
    """Hash of what a stage-2 result depends on; a changed one is not reused.

    `learned`: what is learned matters; hand-made rules depend neither on it nor on the seed.
    """
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text", "adapt", "meta", "evaluation", "seed")}
    for name in ("rules", "protocols", "split", "lanes", "max_articles", "resamples"):
        keys["evaluation"].pop(name)
    keys["adapt"].pop("kernels")  # how it is computed; results agree to rounding
    if not keys["meta"]["read_out_words"]:
        keys["meta"].pop("read_out_words")
    if keys["meta"]["gradient"] in FIRST_ORDER:
        keys["meta"].pop("gradient")
    if not learned:
        for name in ("meta", "seed"):
            keys.pop(name)
        _keep_memory(keys["adapt"])
    return _hash(run, keys)


def _keep_memory(adapt: dict[str, Any]) -> None:
    """Forget settings of adaptation that only learned rules depend on."""
    adapt["surprise"], adapt["phrases"] = 0.0, 0
    if not adapt["basis_words"]:  # else bases are learned so
        adapt["at_once"] = False


def base_identity(run: Run) -> str:
    """Hash of what the long-term memory depends on."""
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text")} | {"adapt": _base_settings(run)}
    return _hash(run, keys)


def _base_settings(run: Run) -> dict[str, Any]:
    """Settings of adaptation that the long-term memory depends on."""
    adapt = to_dict(run.config.adapt)
    for name in ("kernels", "guard"):
        adapt.pop(name)
    _keep_memory(adapt)
    return adapt


def _hash(run: Run, keys: dict[str, Any]) -> str:
    """Of settings, without those that are not in use, and the language model."""
    if not has_low_rank(run.config.adapt.dynamic):
        keys["adapt"].pop("rank")
    for name in ("related", "borders", "basis_words", "at_once", "surprise", "phrases"):
        if not keys["adapt"][name]:
            keys["adapt"].pop(name)
    if keys["adapt"]["precision"] == "float32":
        keys["adapt"].pop("precision")
    if run.config.lm.through == "learned" and run.config.lm.through_run is not None:
        other = RunFolder(run.config.lm.through_run).checkpoint("memory")
        keys["through"] = load_about(other, "make it first (`--stages meta`)").get("identity")
    path = run.folder.checkpoint("lm")
    weights = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    return hashlib.sha256(json.dumps([keys, weights]).encode()).hexdigest()[:16]
