"""Matrix products with bfloat16 factors and float32 sums.

What a lane costs is products of its own matrices, and gradients of their size; with factors of 8
bits of mantissa a processor that multiplies bfloat16 natively (AVX512-BF16, AMX) does them in about
half the time. Weights, gradients, losses and all that is summed from segment to segment stay
float32. Off unless `--adapt.precision bfloat16` on such a processor; on the CPU only, for float32
tensors only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mlm.kernels import buffers
from mlm.kernels.switches import computing, switches


@contextlib.contextmanager
def bfloat16_products(on: bool = True) -> Iterator[None]:
    """bfloat16 products (or not) inside the block, for tests and comparisons."""
    with computing(bfloat16=on):
        yield


def lowered(x: Tensor) -> Tensor:
    """`x` in bfloat16 where products are made so, else `x` itself; see `release_lowered`."""
    if not (switches().bfloat16 and x.dtype == torch.float32 and x.device.type == "cpu"):
        return x
    if not x.is_contiguous() and x.mT.is_contiguous():
        return lowered(x.mT).mT
    return buffers.acquire(tuple(x.shape), x, torch.bfloat16).copy_(x)


def release_lowered(lower: Tensor, x: Tensor) -> None:
    """`lower`, which was `lowered(x)`, is memory for others now."""
    if lower is not x:
        buffers.release([lower if lower.is_contiguous() else lower.mT])


def product(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = x y, or out += x y; a matrix product, or one per lane.

    Factors may be lowered already; they are where bfloat16 products are on.
    """
    a, b = lowered(x), lowered(y)
    if a.dtype == out.dtype:
        if not add:
            return torch.matmul(a, b, out=out)
        return out.addmm_(a, b) if out.dim() == 2 else out.baddbmm_(a, b)
    found = buffers.acquire(tuple(out.shape), out, a.dtype)
    torch.matmul(a, b, out=found)
    if add:  # piece by piece: add_ makes a float32 copy of what it adds
        rows = max(1, buffers.MIN_BYTES // (4 * found[0].numel()))
        for some, more in zip(out.split(rows), found.split(rows), strict=True):
            some.add_(more)
    else:
        out.copy_(found)
    buffers.release([found])
    release_lowered(a, x)
    release_lowered(b, y)
    return out
