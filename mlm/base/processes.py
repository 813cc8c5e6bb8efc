"""Several processes that compute one thing together, as `torchrun` starts them.

All of them run the same program on the same texts and files; each takes its part of the lanes, of
the articles or of the settings, and all have the results. The first (rank 0) alone writes files.
A process that was started by itself is the first of one: nothing here then does anything, and
torch.distributed is not imported.

Two kinds of meeting: `Ranks.sum_` adds tensors up, in the midst of a step; all others are
*meetings*, before which every process says what it has come for. So an interruption of one is one
of all, at the same step, and processes that have gone different ways notice.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from mlm.base.errors import Terminated, UserError, interruptible, noted

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

STEP_MINUTES = 10
"""Longest wait within a step for a process whose machine is gone; one that ends is noticed at
once."""
MEETING_DAYS = 30
"""Longest wait for the others elsewhere: one may have hours of work that cannot be divided."""

_STOP, _TICK, _GATHER = range(3)


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that compute together."""

    rank: int = 0
    """Its place; 0 is the first."""
    world: int = 1
    """How many compute together: 1 where this process works by itself (`alone`)."""
    meeting: Any = None
    """The process group of meetings."""

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and prints."""
        return self.rank == 0

    # -- who does what ----------------------------------------------------------------------

    def share(self, number: int, rank: int | None = None) -> range:
        """Which of `number` lanes are this process's, or another's: an equal share in a row."""
        rank = self.rank if rank is None or self.world == 1 else rank
        rank = 0 if self.world == 1 else rank
        return range(rank * number // self.world, (rank + 1) * number // self.world)

    def share_lanes(self, lanes: int, stage: str) -> range:
        """`share` where nobody may be idle: in every step all lanes are read.

        Raises:
            UserError: there are more processes than lanes.
        """
        if self.world > lanes:
            raise UserError(
                f"{self.world} processes cannot share {lanes} lanes (--{stage}.lanes, at most one "
                "per article); start at most as many processes as lanes, or use more lanes"
            )
        return self.share(lanes)

    def mine(self, sizes: Sequence[float]) -> list[int]:
        """Which works of these sizes are this process's: the largest first, each to whom has least.

        Every work is somebody's, and no one's twice.
        """
        loads, dealt = [0.0] * self.world, [[] for _ in range(self.world)]
        for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
            least = loads.index(min(loads))
            dealt[least].append(k)
            loads[least] += sizes[k]
        return sorted(dealt[0 if self.world == 1 else self.rank])

    # -- together ---------------------------------------------------------------------------

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up all processes' tensors of one dtype, in place, by one all-reduce.

        Raises:
            UserError: another process has ended.
        """
        if self.world == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad(), _naming_the_lost():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank; of anything that can be pickled.

        Raises:
            KeyboardInterrupt: another process was interrupted.
            UserError: another process has ended.
        """
        if self.world == 1:
            return [value]
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._meet(_GATHER, len(data))
        sent = data.new_zeros(max(sizes))
        sent[: len(data)] = data
        parts = [torch.empty_like(sent) for _ in sizes]
        self._wait(dist.all_gather(parts, sent, group=self.meeting, async_op=True))
        return [
            pickle.loads(part[:n].numpy().tobytes()) for part, n in zip(parts, sizes, strict=True)
        ]

    def parts(self, work: Callable[[], T]) -> list[T]:
        """What every process's own part of a work gives, in order of rank, once all are done.

        `work` may be interrupted, and is by itself: no meeting is in it.

        Raises:
            UserError: of whichever process fails.
        """
        if self.world == 1:
            return [work()]
        found, error = None, None
        with interruptible(), alone():
            try:
                found = work()
            except UserError as failed:
                error = failed
        both = self.gather((found, error))
        for _, failed in both:
            if failed is not None:
                raise failed
        return [cast(T, one) for one, _ in both]

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Let the first process do something, such as write a file, while the others wait.

        It is begun when all have come, and all have its value, or its error.

        Raises:
            UserError, OSError: as `action` does.
        """
        if self.world == 1:
            return action() if self.first else None
        value, error = None, None
        self.gather(None)
        if self.first:
            with alone():
                try:
                    value = action()
                except (UserError, OSError) as failed:
                    error = failed
        value, error = self.gather((value, error))[0]
        if error is not None:
            raise error
        return value

    def agree(self, due: bool) -> bool:
        """Whether the first process finds that something is due, between two steps of all.

        Raises:
            KeyboardInterrupt: a process was interrupted; all of them raise it here.
        """
        return due if self.world == 1 else bool(self._meet(_TICK, int(due))[0])

    def stop(self, why: KeyboardInterrupt) -> None:
        """Wait until the interruption of this process has reached all others."""
        number = signal.SIGTERM if isinstance(why, Terminated) else signal.SIGINT
        while self.world > 1 and not self._all_stop(number):
            pass

    def of_all_lanes(
        self, tensors: Mapping[str, Tensor], lanes: int, dim: int = 0
    ) -> dict[str, Tensor]:
        """Tensors of all `lanes` from those of each process's share, for files; in the first only.

        Args:
            dim: the dimension that counts lanes.
        """
        if self.world == 1:
            return dict(tensors)
        import torch
        import torch.distributed as dist

        found: dict[str, Tensor] = {}
        with _naming_the_lost():
            for name, tensor in tensors.items():
                own = tensor.detach().cpu().movedim(dim, 0).contiguous()
                if not self.first:
                    if len(own):
                        dist.send(own.view(torch.uint8), 0, group=self.meeting)
                    continue
                parts = [own]
                for rank in range(1, self.world):
                    part = own.new_empty(len(self.share(lanes, rank)), *own.shape[1:])
                    if len(part):
                        dist.recv(part.view(torch.uint8), rank, group=self.meeting)
                    parts.append(part)
                found[name] = torch.cat(parts).movedim(0, dim)
        return found

    # -- meetings ---------------------------------------------------------------------------

    def _meet(self, what: int, number: int) -> list[int]:
        """The numbers that all processes have come with, for the same purpose.

        Raises:
            KeyboardInterrupt: a process was interrupted.
            RuntimeError: they have come for different purposes.
        """
        said = self._said(what, number, next(iter(noted()), 0))
        signals = [max(n, k) for kind, k, n in said if (kind == _STOP or n)]
        if signals:
            _interrupt(signals[0])
        if any(kind != what for kind, _, _ in said):
            raise RuntimeError(f"processes have gone different ways: {said}")
        return [number for _, number, _ in said]

    def _all_stop(self, number: int) -> bool:
        return all(kind == _STOP for kind, _, _ in self._said(_STOP, number, 0))

    def _said(self, *own: int) -> list[list[int]]:
        """What all processes say, by rank."""
        import torch
        import torch.distributed as dist

        mine = torch.tensor(own)
        all_of_them = [torch.empty_like(mine) for _ in range(self.world)]
        self._wait(dist.all_gather(all_of_them, mine, group=self.meeting, async_op=True))
        return [one.tolist() for one in all_of_them]

    @staticmethod
    def _wait(work: Any) -> None:
        """Wait for others without being deaf to signals, as the library's own wait is."""
        pause = 2e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(1.2 * pause, 0.02)
        with _naming_the_lost():
            work.wait()


_here: dict[str, Ranks] = {"now": Ranks()}


def ranks() -> Ranks:
    """Who this process is among those that compute together."""
    return _here["now"]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself in the block; only the first writes files there, too."""
    before = ranks()
    _here["now"] = Ranks(before.rank)
    try:
        yield
    finally:
        _here["now"] = before


def _interrupt(number: int) -> NoReturn:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Say in one line that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "another process of this job has ended, or cannot be reached "
            f"({_first_line(error)}). What it said, if anything, is beside this line; everything "
            "saved so far is kept, and the same command with --resume goes on"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _number(name: str, usual: int) -> int:
    """A number of the environment.

    Raises:
        UserError: it is none.
    """
    try:
        return int(os.environ.get(name, usual))
    except ValueError:
        raise UserError(
            f"{name}={os.environ[name]!r} in the environment is no number; let torchrun set it"
        ) from None


def started_together() -> int:
    """How many processes the environment says were started to compute together."""
    return _number("WORLD_SIZE", 1)


def refuse_several(command: str) -> None:
    """Refuse to do the same work in several processes.

    Raises:
        UserError: the environment says that there are some.
    """
    if started_together() > 1:
        raise UserError(f"{command} works in one process; leave torchrun out")


def cores_each() -> int:
    """CPU cores for each of the processes on this machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // _number("LOCAL_WORLD_SIZE", 1))


@contextlib.contextmanager
def several_processes(device: str = "auto") -> Iterator[None]:
    """Be one of the processes that `torchrun` has started, within the block; one prints.

    Args:
        device: `cuda` or `auto`: each process of a machine has a GPU of its own, if there are any.

    Raises:
        UserError: the others cannot be met, or there are fewer GPUs than processes.
    """
    if started_together() <= 1:
        yield
        return
    import torch.distributed as dist

    here, store = _join(device)
    try:
        _here["now"] = here
        with contextlib.ExitStack() as stack:
            if not here.first:
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            yield
            here.gather(None)  # nobody leaves while another still wants to hear of it
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        _told(here, store, str(error))
        raise
    finally:
        _here["now"] = Ranks()


def _join(device: str) -> tuple[Ranks, Any]:
    """The process group, and the store behind it."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    cuda = device != "cpu" and torch.cuda.is_available()
    local, there = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if cuda and local >= there:
        raise UserError(
            f"this machine has {there} GPU(s), but process {local + 1} was started on it; start as "
            "many as there are, or use --device cpu"
        )
    if cuda:
        torch.cuda.set_device(local)
    try:
        store, rank, world = next(iter(rendezvous("env://")))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        wait = timedelta(minutes=STEP_MINUTES)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
        meeting = dist.new_group(backend="gloo", timeout=timedelta(days=MEETING_DAYS))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this job cannot meet ({_first_line(error)}). Start them with "
            "torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each; "
            "for one process alone unset WORLD_SIZE"
        ) from None
    return Ranks(rank, world, meeting), store


def _told(here: Ranks, store: Any, message: str) -> None:
    """Print an error that the first process does not print as well."""
    with contextlib.suppress(RuntimeError):
        if here.first:
            store.set("mlm/error", message)
            return
        try:
            store.wait(["mlm/error"], timedelta(seconds=3))
            same = store.get("mlm/error").decode() == message
        except RuntimeError:
            same = False
        if not same:
            print(f"error: process {here.rank}: {message}", file=sys.stderr, flush=True)
