"""How a command ends when it is a program of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megagrow.processes import leave

_INTERRUPTED = 130  # as a shell reports a program that SIGINT ended
_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its status.

    Neither Ctrl-C nor a reader that closes the pipe early (`| head`) causes a traceback.
    """
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = _INTERRUPTED
    except BrokenPipeError:
        # The interpreter's final flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _BROKEN_PIPE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done
    if "megagrow.engine.comm" not in sys.modules:  # no process group was made
        sys.exit(status)
    leave(status)
