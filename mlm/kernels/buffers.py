"""Large CPU tensors used again instead of fetched anew.

Weights and gradients of all lanes are blocks of tens of MB, needed in the same shapes at every
segment. The C library returns such blocks to the system and the system clears them page by page
when they come back, which took up to half of the time to score a segment (2 layers of 650, 16
lanes). Whoever is done with a tensor may `give` it; `take` then finds it. What is not given is
freed as usual. On a GPU PyTorch's own allocator does this.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes below which the C library is quick enough."""


_Key = tuple[tuple[int, ...], torch.dtype]


_free: dict[_Key, list[Tensor]] = {}


def take(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of this shape, on the device and in the dtype of `like`,
    or in another `dtype`.

    The first dimension counts lanes: with another number of them, what was given before is freed.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    found = _free.get((shape[1:], dtype or like.dtype), [])
    if found and found[0].shape != shape:
        found.clear()
    return found.pop() if found else like.new_empty(shape, dtype=dtype)


def give(tensors: Iterable[Tensor]) -> None:
    """Tensors that nobody else will read or write: memory for a later `take`."""
    for tensor in tensors:
        large = tensor.numel() * tensor.itemsize >= SMALLEST
        if large and tensor.device.type == "cpu" and tensor.is_contiguous():
            key = (tuple(tensor.shape[1:]), tensor.dtype)
            found = _free.setdefault(key, [])
            if found and found[0].shape != tensor.shape:
                found.clear()
            found.append(tensor.detach())


def clear() -> None:
    """Free everything that was given."""
    _free.clear()
