"""Tensors in less space: float16 with a power of two per tensor, coarse ones in eight bits.

float16 has 11 bits and the exponents -14 to 15. With each tensor scaled to the upper end, a number
keeps its 11 bits down to 2^-29 of the tensor's largest. A coarse tensor, which holds no negative
number, keeps logarithms: 255 of them in equal steps from its smallest positive number to its
largest. A tensor of one number repeated is kept as that number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

ERROR = 2.0**-10
"""Largest error of a number kept in float16, relative to it."""
COARSE = 2.0**-6
"""Largest error of a number kept in eight bits, relative to it."""
INEXACT = 1e-3
"""Share of a tensor's numbers that may be less exact, or else it takes more space."""
LEVELS = 255
"""Positive numbers that eight bits can stand for."""
TOP = 15
"""Tensors are scaled to less than two to the power of this."""


def pack(
    tensors: dict[str, Tensor], coarse: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The float32 tensors in less space, others as they are, and what `unpack` needs to know.

    Args:
        coarse: names of those of which few bits are enough.
    """
    stored: dict[str, Tensor] = {}
    scales: dict[str, int] = {}
    constants: dict[str, Any] = {}
    logarithms: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            stored[name] = tensor
        elif tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            constants[name] = [float(tensor.flatten()[0]), list(tensor.shape)]
        elif name in coarse and (found := _coarse(tensor)):
            stored[name], logarithms[name] = found
        else:
            exponent = _exponent(tensor)
            half = torch.ldexp(tensor, torch.tensor(exponent)).half()
            if _is_exact(tensor, _unscaled(half, exponent), ERROR):
                stored[name], scales[name] = half, exponent
            else:
                stored[name] = tensor
    return stored, {"scales": scales, "constants": constants, "logarithms": logarithms}


def _coarse(tensor: Tensor) -> tuple[Tensor, list[float]] | None:
    """Each number as its place among `_levels`, uint8, and the ends of these.

    None where a number is negative, none is positive, or the steps between would be too wide.
    """
    logarithms = tensor.double().log2()
    positive = logarithms[tensor > 0]
    if not positive.numel() or bool((tensor < 0).any()):
        return None
    low, high = float(positive.min()), float(positive.max())
    places = ((logarithms - low) / ((high - low) or 1.0) * (LEVELS - 1) + 1).round()
    codes = torch.where(tensor > 0, places.clamp(1, LEVELS), 0).to(torch.uint8)
    again = _levels([low, high])[codes.long()]
    return (codes, [low, high]) if _is_exact(tensor, again, COARSE) else None


def _levels(ends: Sequence[float]) -> Tensor:
    """Zero, and the numbers (LEVELS,) that eight bits stand for besides; `ends` are the binary
    logarithms of the first and the last."""
    low, high = ends
    logarithms = torch.linspace(low, high, LEVELS, dtype=torch.float64)
    return torch.cat([torch.zeros(1), logarithms.exp2().float()])


def _exponent(tensor: Tensor) -> int:
    """The power of two that takes the largest number just below `TOP`."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return TOP - math.frexp(largest)[1]


def _unscaled(half: Tensor, exponent: int) -> Tensor:
    return torch.ldexp(half.float(), torch.tensor(-exponent))


def _is_exact(tensor: Tensor, again: Tensor, error: float) -> bool:
    """Whether nearly all numbers are the same but for this share of them."""
    worse = ~((again - tensor).abs() <= error * tensor.abs())
    return int(worse.sum()) <= INEXACT * tensor.numel()


def unpack(stored: dict[str, Tensor], packing: dict[str, Any]) -> dict[str, Tensor]:
    """What `pack` was given, in float32, in the order of names."""
    tensors = dict(stored)
    for name, exponent in packing["scales"].items():
        tensors[name] = _unscaled(stored[name], exponent)
    for name, (value, shape) in packing["constants"].items():
        tensors[name] = torch.full(shape, value)
    for name, ends in packing.get("logarithms", {}).items():
        tensors[name] = _levels(ends)[stored[name].long()]
    return dict(sorted(tensors.items()))
