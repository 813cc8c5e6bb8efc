"""Large CPU tensors used again instead of fetched anew.

Weights and gradients of all lanes are blocks of tens of MB, needed in the same shapes at every
segment. The C library returns such blocks to the system and the system clears them page by page
when they come back, which took up to half of the time to score a segment (2 layers of 650, 16
lanes). Whoever is done with a tensor may `release` it; `acquire` then finds it. What is not
released is freed as usual. On a GPU PyTorch's own allocator does this. Every thread has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
"""Bytes below which the C library is quick enough."""


_Key = tuple[tuple[int, ...], torch.dtype]


class _Pool(threading.local):
    def __init__(self) -> None:
        self.free: dict[_Key, list[Tensor]] = {}


_pool = _Pool()


def acquire(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of this shape, on the device and in the dtype of `like`,
    or in another `dtype`.

    The first dimension counts lanes: another number of them frees what was released before.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    found = _pool.free.get((shape[1:], dtype or like.dtype), [])
    if found and found[0].shape != shape:
        found.clear()
    return found.pop() if found else like.new_empty(shape, dtype=dtype)


def release(tensors: Iterable[Tensor]) -> None:
    """Tensors that nobody else will read or write: memory for a later `acquire`."""
    for tensor in tensors:
        large = tensor.numel() * tensor.itemsize >= MIN_BYTES
        if large and tensor.device.type == "cpu" and tensor.is_contiguous():
            key = (tuple(tensor.shape[1:]), tensor.dtype)
            found = _pool.free.setdefault(key, [])
            if found and found[0].shape != tensor.shape:
                found.clear()
            found.append(tensor.detach())


def clear() -> None:
    """Free everything that was released."""
    _pool.free.clear()
