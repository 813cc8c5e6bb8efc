"""What the machine has: memory that is free, and how fast it computes."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SHARE = 0.75
"""Of what is free that a run may use unless it is told."""
SEGMENT_SECONDS = 1e-3
"""Of a segment, whatever it computes."""
EFFICIENCY = 0.65
"""Share of the pace of large products that a model's own reach."""


def free_bytes(device: torch.device, root: Path = Path("/")) -> float | None:
    """Memory of the device that is free, or that this process may still have; None = unknown.

    On a CPU the least of what the system has and of what the limits of control groups leave.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + held)
    found = [*_of_system(root), *_of_groups(root)]
    return min(found) if found else None


def _of_system(root: Path) -> Iterator[float]:
    """What the system says is available."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield 1024.0 * int(line.split()[1])
            return
    if root == Path("/") and hasattr(os, "sysconf"):
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        if all(name in os.sysconf_names for name in names):
            yield 0.9 * os.sysconf(names[0]) * os.sysconf(names[1])


def _of_groups(root: Path) -> Iterator[float]:
    """What the limits of this process's control groups, and of those around them, leave."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if kinds
            else ("memory.max", "memory.current")
        )
        here = top / path.strip("/")
        # In a container the group's own folder is the top, whatever its path is called outside.
        for folder in {top, here, *(p for p in here.parents if p.is_relative_to(top))}:
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdigit() and now.isdigit() and int(most) < 1 << 60:
                yield max(0.0, float(int(most) - int(now) + _of_files(folder)))


def _of_files(folder: Path) -> int:
    """Bytes of a group that only hold what files do, which the system takes back."""
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _text(path: Path) -> str:
    """A file of the system, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def resident_bytes(what: str = "VmRSS") -> float:
    """Memory that this process has now (VmHWM: had at most), where the system tells, else 0."""
    for line in _text(Path("/proc/self/status")).splitlines():
        if line.startswith(f"{what}:"):
            return 1024.0 * int(line.split()[1])
    return 0.0


class Pace(NamedTuple):
    """How fast a device is, as measured in a moment."""

    products: float
    """Multiplications with addition in a second."""
    moved: float
    """Bytes read or written in a second."""


@functools.cache
def pace(device: torch.device, threads: int) -> Pace:
    """Measured with products of the size that lanes have, and with copies; some 30 ms."""
    a, b = torch.randn(256, 512, device=device), torch.randn(512, 1024, device=device)
    block = torch.zeros(1 << 22, device=device)
    other = torch.zeros_like(block)
    return Pace(
        256 * 512 * 1024 / _seconds(lambda: torch.mm(a, b), device),
        2 * block.numel() * block.itemsize / _seconds(lambda: other.copy_(block), device),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the quickest of some rounds, at least a microsecond."""
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return max(best, 1e-6)
