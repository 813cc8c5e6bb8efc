"""Long work that may be stopped after any step: what it keeps to go on from, and when."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mlm.base.errors import uninterrupted
from mlm.base.processes import ranks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Tick = Callable[[], None]
"""Called between two steps: the place where work may be saved."""


class Work(Protocol):
    """Work of many steps that can go on from a file, bit for bit."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors by name, and values that JSON holds."""
        ...

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Go on from `state`; nothing has been done yet."""
        ...


LARGE = 1 << 27
"""Bytes of a tensor whose memory goes back to the system with it (`reuse_memory`)."""


def reuse_memory() -> None:
    """Let tensors of up to `LARGE` bytes take memory that others left, where the C library can.

    As it is, glibc gets memory for a tensor over 32 MB from the system, which clears it, and gives
    it back with the tensor: up to a fifth of a training step. It counts for the whole process.
    Were larger ones kept, too, gaps between them would add half to the peak of a large model.
    """
    trim, threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(threshold, LARGE)
        library.mallopt(trim, 2**31 - 1)


def trim_memory() -> None:
    """Give memory that is free back to the system, where the C library can (glibc).

    Tensors of ever other sizes leave gaps between them: over half an hour the process of a large
    model grows to twice its need.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def saved_by_the_clock(save: Callable[[], None], minutes: float) -> Iterator[Tick]:
    """Call `save` on an interruption of the block, and between steps after so many minutes.

    Steps are taken in `uninterrupted` blocks, so that the state that is saved is that of whole
    ones. Of several processes (`mlm.base.processes`) the first looks at its clock; an interruption
    of one stops all of them after the same step.
    """
    last, here = time.monotonic(), ranks()

    def tick() -> None:
        nonlocal last
        if here.agree(time.monotonic() - last >= 60 * minutes):
            with uninterrupted():
                save()
            trim_memory()
            last = time.monotonic()

    with contextlib.ExitStack() as stack:
        if here.world > 1:
            stack.enter_context(uninterrupted())
        try:
            yield tick
        except KeyboardInterrupt as why:
            with uninterrupted():
                here.stop(why)
                save()
            raise


class Progress:
    """Where parts of a stage keep how far they have come. This one keeps nothing."""

    @contextlib.contextmanager
    def of(self, name: str, work: Work) -> Iterator[Tick]:
        """Go on with `work` where it was left; keep it by the clock, when interrupted, and when it
        is done, so that it need not be done again as long as the stage is not.

        Args:
            name: of the part, such as `fisher`.
        """
        yield lambda: None


NOTHING_KEPT = Progress()
"""For work that is quick, or done by hand."""


ADAM = {"step", "exp_avg", "exp_avg_sq"}
"""What Adam remembers of a parameter."""


def adam_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Adam's state as plain tensors; `names` are those of its parameters, in order."""
    state = optimizer.state_dict()["state"]
    return {
        f"adam/{key}/{name}": value
        for k, name in enumerate(names)
        for key, value in state.get(k, {}).items()
    }


def load_adam(optimizer: Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that `adam_tensors` found, in place.

    Raises:
        ValueError: it is of other parameters.
    """
    state = {}
    parameters = iter([p for group in optimizer.param_groups for p in group["params"]])
    for k, name in enumerate(names):
        keys = [n.split("/")[1] for n in tensors if n.startswith("adam/")]
        kept = {key: f"adam/{key}/{name}" for key in keys}
        state[k] = {key: tensors[n] for key, n in kept.items() if n in tensors}
        size = next(parameters).shape
        if any(t.dim() and t.shape != size for t in state[k].values()):
            raise ValueError(f"Adam's state of {name} has another shape")
        if set(state[k]) not in (set(), ADAM):
            raise ValueError(f"Adam's state of {name} is not whole")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
