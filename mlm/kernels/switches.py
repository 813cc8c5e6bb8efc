"""How loops and products are computed: compiled kernels or not, bfloat16 or not, threads.

A process has one setting (`use`). A block of code may have its own (`computing`), which no other
thread sees and no other block changes: so two readers never change each other's numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Switches:
    """How loops and products are computed."""

    kernels: bool = True
    """Compiled loops where numba is there; False = tensor operations."""
    bfloat16: bool = False
    """Lanes' products with bfloat16 factors (`mlm.kernels.bfloat16`)."""
    threads: int = 0
    """Of PyTorch on the CPU; 0 = as many as there are."""


_process = {"switches": Switches()}


_block: ContextVar[Switches | None] = ContextVar("switches", default=None)


def switches() -> Switches:
    """Those that count here: the block's, else the process's."""
    return _block.get() or _process["switches"]


def use(**changes: Any) -> None:
    """Change some of the process's switches."""
    _process["switches"] = replace(_process["switches"], **changes)


@contextlib.contextmanager
def computing(wanted: Switches | None = None, **changes: Any) -> Iterator[None]:
    """Compute with these switches inside the block; `changes` are of those that count now."""
    token = _block.set(wanted or replace(switches(), **changes))
    before = torch.get_num_threads()
    threads = switches().threads or before
    try:
        if threads != before:
            torch.set_num_threads(threads)
        yield
    finally:
        if threads != before:
            torch.set_num_threads(before)
        _block.reset(token)
