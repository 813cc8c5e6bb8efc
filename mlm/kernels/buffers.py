"""Large CPU tensors used again instead of fetched anew.

Weights and gradients of all lanes are blocks of tens of MB, needed in the same shapes at every
segment. The C library returns such blocks to the system and the system clears them page by page
when they come back, which took up to half of the time to score a segment (2 layers of 650, 16
lanes). Whoever is done with a tensor may `release` it; `acquire` then finds it. What is not
released is freed as usual. On a GPU PyTorch's own allocator does this. Every thread has its own.

Debug mode (the variable MLM_DEBUG_BUFFERS, and all tests): a tensor whose memory was released
already is refused, and what is released is filled with NaN, so that who reads it nevertheless
shows in every number.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

NUMBERS = 1 << 24
"""Numbers of an array that is made a block at a time: 128 MB in float64."""
MIN_BYTES = 1 << 20
"""Bytes below which the C library is quick enough."""

DEBUG = bool(os.environ.get("MLM_DEBUG_BUFFERS"))
"""Whether releases are checked."""


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
    """Tensors that nobody else will read or write: memory for a later `acquire`.

    Raises:
        RuntimeError: in debug mode, one shares memory with what was released before.
    """
    for tensor in tensors:
        large = tensor.numel() * tensor.itemsize >= MIN_BYTES
        if large and tensor.device.type == "cpu" and tensor.is_contiguous():
            if DEBUG and tensor.numel():
                _check(tensor)
            key = (tuple(tensor.shape[1:]), tensor.dtype)
            found = _pool.free.setdefault(key, [])
            if found and found[0].shape != tensor.shape:
                found.clear()
            found.append(tensor.detach())


def _check(tensor: Tensor) -> None:
    """Refuse memory that waits in the pool; spoil what goes there."""
    here = tensor.untyped_storage().data_ptr()
    for other in itertools.chain.from_iterable(_pool.free.values()):
        if other.untyped_storage().data_ptr() == here:
            raise RuntimeError(f"a buffer of shape {tuple(tensor.shape)} is released twice")
    if tensor.is_floating_point():
        tensor.detach().fill_(float("nan"))


def clear() -> None:
    """Free everything that was released."""
    _pool.free.clear()
