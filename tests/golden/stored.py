"""The stored form of a golden run, and how another run is held against it.

Of every tensor the file has the shape, the sum, the sum of absolute values, a few evenly spaced
values and the SHA-256 of its bytes. On the machine that wrote the file (processor, libraries and
instruction sets alike: `machine`) the bytes must be the same. On any other one sums are taken in
another order, and exponentials are approximated by other polynomials: in float64 that moves what
is computed here by 1e-15 to 1e-12 of its size, rarely more. There the numbers must agree to
`RELATIVE`, of their own size or the tensor's mean absolute value, whichever is larger, or to
`ABSOLUTE`. Both are far below what any change of a formula or a constant does.

The numbers of another machine say less than the bytes: eight values and two sums of a tensor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.json")
SAMPLES = 8
RELATIVE, ABSOLUTE = 1e-6, 1e-9
LOOSER = {"stage 1": 10.0}
"""By the beginning of a case's name."""

Entry = dict[str, Any]


def machine() -> dict[str, str]:
    """What decides the last bits of a result on a CPU."""
    found = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    for wanted in ("model name", "model", "stepping"):
        values = [line.partition(":")[2].strip() for line in lines if _key(line) == wanted]
        found[wanted] = values[0] if values else ""
    try:
        import llvmlite.binding
        import numba
    except ImportError:
        return {**found, "numba": "none"}
    target = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()  # type: ignore[attr-defined]
    return {**found, "numba": f"{numba.__version__} for {target}"}


def kernels_from_cache() -> bool:
    """Whether no kernel that ran in this process was compiled in it."""
    modules = [
        m for name, m in sys.modules.items() if name.startswith(("mlm.kernels", "mlm.rules"))
    ]
    kernels = [f for m in modules for f in vars(m).values() if hasattr(f, "stats")]
    return not any(sum(kernel.stats.cache_misses.values()) for kernel in kernels)


def _key(line: str) -> str:
    return line.partition(":")[0].strip()


def entry(tensor: Tensor) -> Entry:
    """What the file says of a tensor."""
    array = tensor.detach().cpu().contiguous().numpy()
    flat = array.astype(np.float64).ravel()
    at = np.unique(np.linspace(0, max(0, flat.size - 1), SAMPLES).round().astype(int))
    return {
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        "shape": list(array.shape),
        "sum": float(flat.sum()),
        "abs": float(np.abs(flat).sum()),
        "samples": flat[at].tolist() if flat.size else [],
    }


def entries(found: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Those of a case."""
    return {name: entry(tensor) for name, tensor in found.items()}


def distance(mine: Entry, stored: Entry) -> float:
    """The largest difference of two entries, in units of what other machines are allowed."""
    size = max(1, int(np.prod(stored["shape"])))
    mean = stored["abs"] / size
    pairs = [(mine["sum"] / size, stored["sum"] / size), (mine["abs"] / size, mean)]
    pairs += zip(mine["samples"], stored["samples"], strict=True)
    found = [abs(a - b) / (ABSOLUTE + RELATIVE * max(abs(b), mean)) for a, b in pairs]
    return float("inf") if any(np.isnan(found)) else max(found)


def allowed(case: str) -> float:
    """How many times `RELATIVE` another machine may be away in a case."""
    return LOOSER.get(case.partition(":")[0], 1.0)


def differences(
    mine: Mapping[str, Entry], stored: Mapping[str, Entry], bits: bool, most: float = 1.0
) -> list[str]:
    """What has moved, one line for every tensor.

    Args:
        bits: the bytes are to be the same.
        most: else, `allowed`.
    """
    found = [f"{name}: only in the file" for name in stored if name not in mine]
    for name, one in mine.items():
        if name not in stored:
            found.append(f"{name}: not in the file")
        elif one["shape"] != stored[name]["shape"]:
            found.append(f"{name}: shape {one['shape']}, not {stored[name]['shape']}")
        elif bits and one["sha256"] != stored[name]["sha256"]:
            far = distance(one, stored[name]) * RELATIVE
            found.append(f"{name}: other bytes; numbers differ by {far:.2g} of their size")
        elif not bits and (far := distance(one, stored[name])) > most:
            found.append(f"{name}: numbers differ by {far * RELATIVE:.2g} of their size")
    return found


def load() -> dict[str, Any]:
    """The file: `machine`, and `cases` by name, each with its entries."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(cases: Mapping[str, Mapping[str, Entry]]) -> None:
    """Write the file, an entry a line."""
    blocks = []
    for case, own in cases.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in own.items()]
        blocks.append(f" {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n }")
    head = f'{{\n"machine": {json.dumps(machine())},\n"cases": {{\n'
    FILE.write_text(head + ",\n".join(blocks) + "\n}\n}\n", encoding="utf-8")
