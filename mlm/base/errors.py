"""User-facing failures: one clear message, a non-zero exit, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


def plain(text: str) -> str:
    """Text as one line that moves no cursor: other characters than printable ones are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and how to fix it.

    It is one line, whatever names and values are in it (`plain`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


_SCRIPTS = {"train": "train.py", "evaluate": "evaluate.py", "show": "visualize.py"}


def command_of(name: str) -> str:
    """How whoever started this process calls a subcommand: `mlm train` or `python train.py`."""
    script = _SCRIPTS.get(name)
    started = Path(sys.argv[0]).name in _SCRIPTS.values()
    return f"python {script}" if script and started else f"mlm {name}"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler, or the system, wants the process to end. It saves as Ctrl-C does."""


_held = 0
"""Blocks of `uninterrupted` that are open."""
_noted: list[int] = []
"""Signals that came meanwhile."""


def _interrupt(number: int, _: object = None) -> None:
    """What SIGINT and SIGTERM do: end the main thread, outside `uninterrupted` blocks."""
    if _held:
        _noted.append(number)
    else:
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _handle(number: int, usual: object) -> bool:
    """Let `_interrupt` handle a signal that has its `usual` handler; whether it does now."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(number) is not usual:
        return False
    signal.signal(number, _interrupt)
    return True


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is through: no step is half done when its state
    is saved. SIGTERM is held back where `run_cli` handles it.

    Raises:
        KeyboardInterrupt: after the block, if Ctrl-C was pressed in it; `Terminated` for SIGTERM.
    """
    global _held
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = _handle(signal.SIGINT, signal.default_int_handler)
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        noted = [] if _held else _noted.copy()
        if not _held:
            _noted.clear()
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if noted:
        _interrupt(noted[0])


def noted() -> list[int]:
    """Signals that `uninterrupted` holds back."""
    return [*_noted]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM, those held back included, end a part of an `uninterrupted` block.

    Raises:
        KeyboardInterrupt: as there.
    """
    global _held
    before, _held = _held, 0
    try:
        if _noted:
            _interrupt(_noted[0])
        yield
    finally:
        _held = before


@contextlib.contextmanager
def going_on(how: Callable[[], str]) -> Iterator[None]:
    """Let an interruption of the block say `how` to go on; asked for when it comes."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(how())
        raise


def _interrupted(stop: KeyboardInterrupt) -> str:
    """The one line about an interruption."""
    how = "; ".join(getattr(stop, "__notes__", ()))
    why = "interrupted by SIGTERM" if isinstance(stop, Terminated) else "interrupted"
    return f"{why}; everything saved so far is kept" + (f". To go on: {how}" if how else "")


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line entry point; turn foreseeable failures into one line on stderr.

    Exit codes: 1 for a `UserError` or what the system refuses (a full disk, a folder that must not
    be written), 130 for Ctrl-C, 143 for SIGTERM, which saves as Ctrl-C does. Unforeseen errors keep
    their traceback, because they are bugs.
    """
    mine = _handle(signal.SIGTERM, signal.SIG_DFL)
    try:
        _run(main)
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(main: Callable[[], None]) -> None:
    """`run_cli` but for SIGTERM's handler."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks "−" shows "?" instead
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        _tell(f"error: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt as stop:
        _tell(_interrupted(stop))
        raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        if error.errno in _FULL:
            message = (
                f"cannot write{where}: {error.strerror}. Free some space or choose another folder; "
                f"files already complete are kept, and {command_of('train')} --resume continues "
                "from them"
            )
        else:
            message = f"cannot use{where}: {error.strerror}. Check the path and its permissions"
        _tell(f"error: {message}")
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or "no more can be had"
        _tell(
            f"error: out of memory ({said}). Use fewer lanes (--lanes, --meta.lanes, "
            "--evaluation.lanes), a smaller model, or a machine with more memory; everything saved "
            "so far is kept"
        )
        raise SystemExit(1) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether numpy or PyTorch, on the CPU or on a GPU (`torch.OutOfMemoryError`), got none."""
    text = f"{type(error).__name__} {error}"
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("OutOfMemoryError", "can't allocate memory")
    )


def _tell(line: str) -> None:
    """A last word; of several processes (`mlm.base.processes`) the first has it."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
