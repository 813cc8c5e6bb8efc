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


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and how to fix it."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is through: no step is half done when its state is saved.

    Raises:
        KeyboardInterrupt: after the block, if Ctrl-C was pressed in it.
    """
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line entry point; turn foreseeable failures into one line on stderr.

    Exit codes: 1 for a `UserError` or what the system refuses (a full disk, a folder that must not
    be written), 130 for Ctrl-C. Unforeseen errors keep their traceback, because they are bugs.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks "−" shows "?" instead
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; everything saved so far is kept", file=sys.stderr)
        raise SystemExit(130) from None
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
                "files already complete are kept, and train.py --resume continues from them"
            )
        else:
            message = f"cannot use{where}: {error.strerror}. Check the path and its permissions"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
