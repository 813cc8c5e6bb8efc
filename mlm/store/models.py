"""Language models and bases of adaptation as files, saved and loaded with checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.kinds import kinds, shown, type_problem
from mlm.extensions.learned_basis import folded_matrices, follow_weights
from mlm.models.base import AdaptationBase
from mlm.models.language_model import LanguageModel
from mlm.models.low_rank import LOW
from mlm.models.recurrent import BaseModel, RecurrentLM
from mlm.models.snail import SnailShape
from mlm.settings.checks import range_of
from mlm.store.tensors import check_tensors, damaged, entry, load_tensors, save_tensors


def save_lm(
    path: Path, weights: dict[str, Tensor], shape: BaseModel, vocabulary_hash: str, **more: Any
) -> None:
    """Write a language model's weights."""
    about = {"shape": _record(shape), "vocabulary": vocabulary_hash, **more}
    save_tensors(path, weights, about, of_model=True, keep_previous=True)


def _record(shape: LanguageModel) -> dict[str, Any]:
    """A model's sizes, from which `_shape` makes it again.

    Raises:
        UserError: it is a module of the user's own, whose code no file holds.
    """
    if not isinstance(shape, (RecurrentLM, SnailShape)):
        raise UserError(
            f"a {type(shape).__name__} cannot be written to a checkpoint, which holds no code. "
            "Save the tensors of `base.weights` and `base.rms`, and make the model anew"
        )
    return dataclasses.asdict(shape)


def _shape(path: Path, about: dict[str, Any]) -> RecurrentLM | SnailShape:
    try:
        values = {**about["shape"], "cutoffs": tuple(about["shape"]["cutoffs"])}
        shape = SnailShape(**values) if values.get("cell") == "snail" else RecurrentLM(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from None
    for name, kind in kinds(shape).items():
        value, allowed = getattr(shape, name), range_of(f"model.{name}")
        numbers = value if isinstance(value, tuple) else (value,)
        problem = type_problem(kind, value)
        if problem is None and allowed is not None and not all(map(allowed.holds, numbers)):
            problem = f"it must be {allowed}"
        if problem:
            raise damaged(path, f"{name} is {shown(value)}; {problem}")
    return shape


def _sizes(shape: BaseModel, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The sizes of a model's weights, by name."""
    return {prefix + name: tuple(size) for name, (size, _) in shape.layout().items()}


def check_vocabulary(path: Path, about: dict[str, Any], vocabulary_hash: str) -> None:
    """Refuse weights that belong to another vocabulary.

    Raises:
        UserError: the hashes differ.
    """
    if about.get("vocabulary") != vocabulary_hash:
        raise UserError(
            f"{path} belongs to another vocabulary than the text was encoded with. Use the "
            "vocabulary of its own run folder, or train again with another --out"
        )


def load_lm(
    path: Path, vocabulary_hash: str
) -> tuple[dict[str, Tensor], BaseModel, dict[str, Any]]:
    """Weights, sizes and description of a language model.

    Raises:
        UserError: missing, damaged, or from another vocabulary.
    """
    weights, about = load_tensors(path, "train the language model first (`--stages lm`)")
    check_vocabulary(path, about, vocabulary_hash)
    shape = _shape(path, about)
    check_tensors(path, weights, _sizes(shape))
    return weights, shape, about


def save_base(
    path: Path,
    base: AdaptationBase,
    vocabulary_hash: str,
    identity: str = "",
    made_with: Sequence[str] = (),
    packed: bool = False,
) -> None:
    """Write theta_0, the Fisher and what extensions made.

    Args:
        identity: names what it was made from.
        made_with: the extensions that it depends on.
        packed: in less space, less exactly (`mlm.store.compact`); the Fisher coarsely, since it is
            an estimate and only scales steps.
    """
    tensors = {f"theta_0/{n}": w for n, w in base.weights.items()}
    fisher = {f"rms/{n}": r for n, r in base.rms.items()}
    tensors |= fisher
    about = {
        "shape": _record(base.model),
        "vocabulary": vocabulary_hash,
        "dynamic": list(base.dynamic),
        "loss": base.loss,
        "segment": base.segment,
        "identity": identity,
        "made_with": list(made_with),
    }
    save_tensors(path, tensors, about, packed=tensors if packed else (), coarse=fisher)


def load_base(
    path: Path, vocabulary_hash: str, made_with: Sequence[str] | None = None
) -> AdaptationBase:
    """The adaptation base of a run.

    Args:
        made_with: the extensions that it has to depend on; None = any.

    Raises:
        UserError: missing, damaged, from another vocabulary, or made with other extensions.
    """
    tensors, about = load_tensors(path, "make it first (`--stages meta`)")
    check_vocabulary(path, about, vocabulary_hash)
    its_own = entry(path, about, "made_with", tuple[str, ...])
    if made_with is not None and tuple(made_with) != its_own:
        its, mine = (", ".join(names) or "no extension" for names in (its_own, made_with))
        raise UserError(
            f"{path} was made with {its}, but the settings say {mine}; run `--stages meta` again"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    shape = _shape(path, about)
    check_tensors(path, tensors, _sizes(shape, "theta_0/"))
    dynamic = entry(path, about, "dynamic", tuple[str, ...])
    loss, segment = entry(path, about, "loss", float), entry(path, about, "segment", int)
    base = AdaptationBase(shape, part("theta_0/"), dynamic, part("rms/"), loss, segment)
    unknown = [n for n in dynamic if n not in base.weights and not n.endswith(LOW)]
    if unknown:
        raise damaged(path, f"there is no weight {unknown[0]} to adapt")
    fisher = {f"rms/{n}": tuple(w.shape) for n, w in base.weights.items() if n in base.dynamic}
    check_tensors(path, tensors, fisher)
    negative = [name for name in base.rms if bool((base.rms[name] < 0).any())]
    if negative or not math.isfinite(base.loss):
        raise damaged(path, f"the Fisher of {', '.join(negative)}" if negative else "its loss")
    # Of a released model, L_0 is left to follow from the matrix and its basis.
    whole = all(name + LOW in base.weights for name in folded_matrices(base))
    return base if whole else follow_weights(base, base.static)
