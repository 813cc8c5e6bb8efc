"""Tensors in half the space: float16 with a power of two per tensor, constant ones as one number.

float16 has 11 bits and the exponents -14 to 15. With each tensor scaled to the upper end, a number
keeps its 11 bits down to 2^-29 of the tensor's largest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ERROR = 2.0**-10
"""Largest error of a number kept in float16, relative to it."""
INEXACT = 1e-3
"""Share of a tensor's numbers that may be less exact, or else it stays float32."""
TOP = 15
"""Tensors are scaled to less than two to the power of this."""


def pack(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The float32 tensors in less space, others as they are, and what `unpack` needs to know."""
    stored: dict[str, Tensor] = {}
    scales: dict[str, int] = {}
    constants: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            stored[name] = tensor
        elif tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            constants[name] = [float(tensor.flatten()[0]), list(tensor.shape)]
        else:
            exponent = _exponent(tensor)
            half = torch.ldexp(tensor, torch.tensor(exponent)).half()
            if _is_exact(tensor, _unscaled(half, exponent)):
                stored[name], scales[name] = half, exponent
            else:
                stored[name] = tensor
    return stored, {"scales": scales, "constants": constants}


def _exponent(tensor: Tensor) -> int:
    """The power of two that takes the largest number just below `TOP`."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return TOP - math.frexp(largest)[1]


def _unscaled(half: Tensor, exponent: int) -> Tensor:
    return torch.ldexp(half.float(), torch.tensor(-exponent))


def _is_exact(tensor: Tensor, again: Tensor) -> bool:
    """Whether nearly all numbers are about the same."""
    worse = ~((again - tensor).abs() <= ERROR * tensor.abs())
    return int(worse.sum()) <= INEXACT * tensor.numel()


def unpack(stored: dict[str, Tensor], packing: dict[str, Any]) -> dict[str, Tensor]:
    """What `pack` was given, in float32, in the order of names."""
    tensors = dict(stored)
    for name, exponent in packing["scales"].items():
        tensors[name] = _unscaled(stored[name], exponent)
    for name, (value, shape) in packing["constants"].items():
        tensors[name] = torch.full(shape, value)
    return dict(sorted(tensors.items()))
