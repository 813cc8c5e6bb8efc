"""User-facing failures: one clear message, a non-zero exit, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and how to fix it."""


def run_cli(main: Callable[[], None]) -> None:
    """Run a command-line entry point; turn foreseeable failures into one line on stderr.

    Exit codes: 1 for a `UserError` or a full disk, 130 for Ctrl-C. Unforeseen errors keep their
    traceback, because they are bugs.
    """
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            where = f" ({error.filename})" if error.filename else ""
            print(
                f"error: cannot write{where}: {error.strerror}. Free some space or choose another "
                "folder; files already complete are kept and --resume continues from them",
                file=sys.stderr,
            )
            raise SystemExit(1) from None
        raise
