"""Low-rank dynamic weights: a matrix that follows the article without a copy for every lane.

    W_lane = W + D_lane P

W (O, I) is shared, P (r, I) are fixed directions shared by the lanes, D_lane (O, r) is rewritten
while reading and zero at the start of every article: FLUSH pulls it to zero, and without an update
the model is the static one. For a matrix `name` the weights D and P are `name.low` and
`name.directions`; `softmax.low` changes the output layer only, not the embedding it is tied to (of
an adaptive softmax the head with its clusters), `lstm.*.input.low` and `lstm.*.recurrent.low` the
gates. With r = I the change is the matrix itself in another basis, and reading is faster with

    W_lane x = (W P^-1 + D_lane) (P x)

one product instead of two (`fold_weights`): then `name.low` starts at W P^-1, and P is
`name.basis`. `mlm.training.directions` finds P.

Letters: B lanes, T time, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mlm.base.errors import UserError
from mlm.models.language_model import Weights
from mlm.models.recurrence import lane_linear

LOW, DIRECTIONS, BASIS = ".low", ".directions", ".basis"
"""Endings of a low-rank change's two factors, and of the second where the first holds the whole
matrix."""


def linear(x_BTI: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T for a shared (O, I) or a per-lane (B, O, I) weight."""
    return x_BTI @ weight.transpose(-1, -2)


def along_directions(weights: Weights, name: str, x_BTI: Tensor) -> Tensor | None:
    """x P^T, (B, T, r), for P (r, I), the directions or the basis; None without a change."""
    directions = weights.get(f"{name}.{'basis' if is_folded(weights, name) else 'directions'}")
    return None if directions is None else linear(x_BTI, directions)


def is_folded(weights: Weights, name: str) -> bool:
    """Whether `name.low` holds the whole matrix, along `name.basis` (`fold_weights`)."""
    return f"{name}.basis" in weights


def low_rank_product(weights: Weights, name: str, x_BTI: Tensor) -> Tensor | None:
    """x (D P)^T, (B, T, O): what the low-rank change of a matrix adds to its product with x.

    D = `name.low` is (O, r) or (B, O, r). None without it.
    """
    along = along_directions(weights, name, x_BTI)
    if along is None:
        return None
    low = weights[f"{name}.low"]
    return lane_linear(along, low, low.new_zeros(low.shape[-2]))


def dense(weights: Weights, name: str) -> Tensor:
    """A matrix with its low-rank change folded in: W + D P, per lane where W or D is."""
    low = weights.get(f"{name}.low")
    if low is None:
        return weights[name]
    if is_folded(weights, name):
        return low @ weights[f"{name}.basis"]
    return weights[name] + low @ weights[f"{name}.directions"]


def base_of(name: str) -> str:
    """The name of the matrix that `name.low` changes."""
    return "embedding" if name == "softmax" else name


def fold_weights(weights: Weights, dynamic: tuple[str, ...]) -> Weights:
    """Weights in which changes of full rank hold the matrix they change; the model is the same.

    Not recurrent matrices, whose change is a term in the time loop, nor what adapts without a
    change, too, nor the head of an adaptive softmax, which has other rows.
    """
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


def folds(
    sizes: Mapping[str, tuple[int, ...]], dynamic: Sequence[str], rank: int
) -> tuple[str, ...]:
    """Names of the matrices that `fold_weights` will fold, of a model of these sizes."""
    found = []
    for name in [n.removesuffix(LOW) for n in dynamic if n.endswith(LOW)]:
        base = base_of(name)
        outputs, inputs = sizes[base]
        whole = name != "softmax" or sizes["softmax.bias"][0] == outputs
        if whole and rank >= inputs and base not in dynamic and not name.endswith(".recurrent"):
            found.append(name)
    return tuple(found)


def coupled(x_V: Tensor, coupling: Tensor | None) -> Tensor:
    """T x for rows x (..., V), T = I + Q Q^T."""
    return x_V if coupling is None else x_V + (x_V @ coupling) @ coupling.t()
