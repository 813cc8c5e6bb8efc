"""What this processor, and oneDNN on it, can do in bfloat16.

PyTorch tells what the processor has; oneDNN, which makes its products and LSTM layers, may be held
to less by `ONEDNN_MAX_CPU_ISA`.
"""

from __future__ import annotations

import functools
import os

import torch

_BELOW_BFLOAT16 = {
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}
"""Limits of oneDNN without bfloat16 products."""


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are native (AVX512-BF16, AMX): elsewhere they are slower than
    float32, with AVX2 by tens of times."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in _BELOW_BFLOAT16:
        return False
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@functools.cache
def trains_bfloat16() -> bool:
    """Whether an LSTM can be trained with bfloat16 products, native or not; tried once."""
    x, state = torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)
    sizes = ((16, 4), (16, 4), (16,), (16,))
    weights = [torch.zeros(size, requires_grad=True) for size in sizes]
    try:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            out = torch.lstm(x, [state, state], weights, True, 1, 0.0, True, False, True)[0]
        out.float().sum().backward()
    except RuntimeError:  # oneDNN has no such layer before AVX-512
        return False
    return True
