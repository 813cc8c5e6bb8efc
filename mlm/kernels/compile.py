"""Compiled CPU kernels of the engine (numba): time loop, softmax, update, meta-gradient.

Every kernel has an eager twin beside its caller, which runs on other devices, without numba, or
inside `eager()`; the tests hold both against slow references in float64. Lanes (or weights) are
dealt to threads of our own that meet once per call, so no OpenMP barrier stands in a time loop.
Letters: B lanes, T time, H hidden, G = 4H gates (LSTM), V vocabulary, N weights of a tensor,
K columns.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm.kernels.switches import computing, switches

try:
    import numba
    from numba.extending import overload
except ImportError:  # the eager path remains
    numba: Any = None


_ALONE = 1 << 16
"""Elements below which a second thread costs more than it saves."""


_FLAGS = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and products fused; NaN and infinity keep their meaning."""


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Work without the kernels, for tests and comparisons."""
    with computing(kernels=False):
        yield


def usable(*tensors: Tensor) -> bool:
    """Whether these tensors can go through a kernel: on the CPU, float32 or float64."""
    if numba is None or not switches().kernels:
        return False
    return all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) for t in tensors
    )


@functools.lru_cache(1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mlm")


def _array(tensor: Tensor) -> np.ndarray:
    if not tensor.is_contiguous():
        raise ValueError("a kernel was given a tensor that is not contiguous")
    return tensor.detach().numpy()


def share_out(kernel: Callable[..., None], number: int, work: int, *arguments: Any) -> None:
    """kernel(lo, hi, *arguments) over 0..number in as many parts as PyTorch has threads.

    Tensors among the arguments must be contiguous: kernels write into them. `work` is the number
    of multiply-adds behind the call: small calls stay in this thread.
    """
    arguments = tuple(_array(a) if isinstance(a, Tensor) else a for a in arguments)
    threads = min(torch.get_num_threads(), number)
    if threads <= 1 or work < _ALONE:
        kernel(0, number, *arguments)
        return
    edges = [number * k // threads for k in range(threads + 1)]
    pool = _pool(torch.get_num_threads())
    others = [pool.submit(kernel, edges[k], edges[k + 1], *arguments) for k in range(1, threads)]
    kernel(edges[0], edges[1], *arguments)
    for other in others:
        other.result()


def jit(function: Any) -> Any:
    if numba is None:
        return function
    settings = {"nogil": True, "fastmath": _FLAGS, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # no folder to keep the compiled code in: compile in every process
        return numba.njit(**settings)(function)


def fast_exp(x: float) -> float:
    """exp(x): in float32 a polynomial the compiler vectorises (2e-7 relative), else `math.exp`."""
    return math.exp(x)


def _exp32(x):
    # exp x = 2^n exp r, |r| <= ln 2 / 2; NaN fails both comparisons and stays NaN.
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@jit
def widened(bits):
    """The float32 of a bfloat16, which is given as its 16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@jit
def narrowed(x):
    """The bits of the bfloat16 nearest to a finite float32, ties to even."""
    bits = np.float32(x).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


if numba is not None:

    @overload(fast_exp, jit_options={"fastmath": _FLAGS})  # type: ignore[call-arg]
    def _fast_exp(x):
        return _exp32 if x == numba.types.float32 else lambda x: math.exp(x)
