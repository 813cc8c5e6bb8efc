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
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm.kernels.switches import computing, switches

try:
    import numba
    from numba.core.caching import FunctionCache
    from numba.extending import overload
except ImportError:  # the eager path remains
    numba: Any = None
    FunctionCache: Any = object


_ALONE = 1 << 16
"""Elements below which a second thread costs more than it saves."""


_FLAGS = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and products fused; NaN and infinity keep their meaning."""
_SETTINGS = {"nogil": True, "fastmath": _FLAGS, "error_model": "numpy"}


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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads stayed in the parent


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor as a kernel gets it; of a bfloat16 one the bits.

    Raises:
        ValueError: the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError("a kernel was given a tensor that is not contiguous")
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.detach().numpy()


def share_out(kernel: Callable[..., None], number: int, work: int, *arguments: Any) -> None:
    """kernel(lo, hi, *arguments) over 0..number in as many parts as PyTorch has threads.

    Tensors among the arguments must be contiguous: kernels write into them; of bfloat16 they get
    the bits. `work` is the number of multiply-adds behind the call: small calls stay in this
    thread.
    """
    arguments = tuple(as_array(a) if isinstance(a, Tensor) else a for a in arguments)
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
    """A kernel, compiled when it is first called, or loaded as it was compiled before."""
    return _compiled(function, forceinline=False)


def inlined(function: Any) -> Any:
    """A part of kernels, which each of them has in its own code.

    Compiled by itself a part may round otherwise than within a kernel. A process that has compiled
    it would call that one, and one that has loaded the kernel from numba's cache the kernel's own.
    """
    return _compiled(function, forceinline=True)


def _compiled(function: Any, forceinline: bool) -> Any:
    if numba is None:
        return function
    found = numba.njit(**_SETTINGS, forceinline=forceinline)(function)
    with contextlib.suppress(RuntimeError):  # no folder to keep the compiled code in
        found._cache = _Cache(function)
    return found


class _Cache(FunctionCache):
    """Numba's cache of a function's compiled code, keyed by all that is compiled into it.

    Numba itself looks at the function's own file.
    """

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), compiled_in(self._py_func))


def compiled_in(function: Any) -> str:
    """Hash of what is compiled into a kernel: the functions it calls, the constants that these and
    it take from their modules, and how it is compiled."""
    found: dict[str, str] = {}
    _add_code(function, found)
    for stands in (_exp32, widened):  # for `fast_exp` and `as_float`
        _add_code(stands, found)
    settings = {**_SETTINGS, "fastmath": sorted(_FLAGS), "parts": "inlined"}
    return hashlib.sha256(repr((settings, sorted(found.items()))).encode()).hexdigest()


def _add_code(function: Any, found: dict[str, str]) -> None:
    """Add a function, and what it names, to `found`: their full names and what they are."""
    function = getattr(function, "py_func", function)
    code, here = function.__code__, f"{function.__module__}.{function.__qualname__}"
    if here in found:
        return
    found[here] = f"{code.co_code.hex()} {_plain(code.co_consts)}"
    named = (function.__globals__.get(name) for name in code.co_names)
    modules = [v for v in named if inspect.ismodule(v) and v not in (math, np)]
    for name in code.co_names:
        for space in (function.__globals__, *map(vars, modules)):
            value = space.get(name)
            if inspect.isfunction(getattr(value, "py_func", value)):
                _add_code(value, found)
            elif value is not None and _plain([value]):
                found[f"{here}: {name}"] = _plain([value])


def _plain(values: Iterable[Any]) -> str:
    """The numbers, texts and tuples of these among `values`."""
    kinds = (int, float, complex, str, bytes, tuple, np.generic)
    return " ".join(repr(value) for value in values if isinstance(value, kinds))


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


@inlined
def widened(bits):
    """The float32 of a bfloat16, which is given as its 16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined
def narrowed(x):
    """The bits of the bfloat16 nearest to a finite float32, ties to even."""
    bits = np.float32(x).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


def as_float(x):
    """A number to compute with: of a bfloat16, given as its 16 bits, the float32."""
    return x


if numba is not None:

    @overload(as_float, jit_options={"fastmath": _FLAGS, "forceinline": True})  # type: ignore[call-arg]
    def _as_float(x):
        return (lambda x: widened(x)) if x == numba.types.uint16 else (lambda x: x)

    @overload(fast_exp, jit_options={"fastmath": _FLAGS, "forceinline": True})  # type: ignore[call-arg]
    def _fast_exp(x):
        return _exp32 if x == numba.types.float32 else lambda x: math.exp(x)
