"""models.low_rank"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mlm.base.errors import UserError
from mlm.models.language_model import Weights
from mlm.models.recurrence import lane_linear


def _linear(x_BTI: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T for a shared (O, I) or a per-lane (B, O, I) weight."""
    return x_BTI @ weight.transpose(-1, -2)


def _along(weights: Weights, name: str, x_BTI: Tensor) -> Tensor | None:
    """x P^T, (B, T, r), for P (r, I), the directions or the basis; None without a change."""
    directions = weights.get(f"{name}.{'basis' if _turned(weights, name) else 'directions'}")
    return None if directions is None else _linear(x_BTI, directions)


def _turned(weights: Weights, name: str) -> bool:
    """Whether `name.low` holds the whole matrix, along `name.basis` (`mlm.models.base.turned`)."""
    return f"{name}.basis" in weights


def _low_rank(weights: Weights, name: str, x_BTI: Tensor) -> Tensor | None:
    """x (D P)^T, (B, T, O): what the low-rank change of a matrix adds to its product with x.

    D = `name.low` is (O, r) or (B, O, r). None without it.
    """
    along = _along(weights, name, x_BTI)
    if along is None:
        return None
    low = weights[f"{name}.low"]
    return lane_linear(along, low, low.new_zeros(low.shape[-2]))


def _dense(weights: Weights, name: str) -> Tensor:
    """A matrix with its low-rank change folded in: W + D P, per lane where W or D is."""
    low = weights.get(f"{name}.low")
    if low is None:
        return weights[name]
    if _turned(weights, name):
        return low @ weights[f"{name}.basis"]
    return weights[name] + low @ weights[f"{name}.directions"]


LOW, DIRECTIONS, BASIS = ".low", ".directions", ".basis"
"""Endings of a low-rank change's two factors, and of the second where the first holds the whole
matrix (see `mlm.training.directions`)."""


def base_of(name: str) -> str:
    """The name of the matrix that `name.low` changes."""
    return "embedding" if name == "softmax" else name


def whole(weights: Weights, dynamic: tuple[str, ...]) -> Weights:
    """`turned`, of the weights alone."""
    weights = dict(weights)
    for name in [n.removesuffix(DIRECTIONS) for n in weights if n.endswith(DIRECTIONS)]:
        base = base_of(name)
        directions, low, matrix = weights[name + DIRECTIONS], weights[name + LOW], weights[base]
        square = len(directions) == directions.shape[1] and len(low) == len(matrix)
        if not square or base in dynamic or name.endswith(".recurrent"):
            continue
        inverse = directions.t() / directions.square().sum(1)  # its rows are orthogonal
        weights[name + LOW] = low + matrix @ inverse
        weights[name + BASIS] = weights.pop(name + DIRECTIONS)
    return weights


def check_rank(path: Path, weights: Weights, rank: int) -> None:
    """Refuse a long-term memory whose low-rank changes have another rank than the settings say.

    Raises:
        UserError: names `path`, both ranks and the way out.
    """
    for name in [name for name in weights if name.endswith(DIRECTIONS)]:
        made, inputs = weights[name].shape
        if made != min(rank, inputs):
            raise UserError(
                f"{path}: {name.removesuffix(DIRECTIONS)}{LOW} has rank {made}, but the settings "
                f"say --rank {rank}; run `--stages meta` again"
            )
