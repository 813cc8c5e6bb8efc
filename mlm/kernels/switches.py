"""How loops and products are computed: compiled kernels or not, bfloat16 or not, threads.

A process has one setting (`use`). A block of code may have its own (`computing`), which no other
thread sees and no other block changes: so two readers never change each other's numbers. A
forked child (`os.fork`, `multiprocessing`'s "fork") computes on one thread.
"""

from __future__ import annotations

import contextlib
import os
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


_forked = {"child": False}


def use_threads(number: int) -> None:
    """Let PyTorch use so many CPU threads; 0 changes nothing.

    A forked child keeps to one: OpenMP's other threads stayed in its parent, and PyTorch would wait
    for them for ever.
    """
    if number and not _forked["child"]:
        torch.set_num_threads(number)


def _in_child() -> None:
    torch.set_num_threads(1)
    _forked["child"] = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextlib.contextmanager
def computing(wanted: Switches | None = None, **changes: Any) -> Iterator[None]:
    """Compute with these switches inside the block; `changes` are of those that count now."""
    token = _block.set(wanted or replace(switches(), **changes))
    before = torch.get_num_threads()
    threads = switches().threads or before
    try:
        if threads != before:
            use_threads(threads)
        yield
    finally:
        if threads != before:
            use_threads(before)
        _block.reset(token)
