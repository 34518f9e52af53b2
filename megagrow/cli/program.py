"""How a command ends when it is a program of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_INTERRUPTED = 130  # as a shell reports a program that SIGINT ended
_BROKEN_PIPE = 141  # as a shell has it for a program that SIGPIPE ended


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its status.

    A reader that closes the pipe early (`| head`) ends it without a traceback, and so does Ctrl-C.
    """
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = _INTERRUPTED
    except BrokenPipeError:
        # What is still buffered must not fail once more when the interpreter flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _BROKEN_PIPE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command has ended; let it leave in peace
    if "megagrow.engine.comm" not in sys.modules:  # no process group was made
        sys.exit(status)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process without the interpreter's own teardown.

    Threads of PyTorch's communication may outlive there what they use, and then abort a job that
    has come to its end ("terminate called without an active exception", status 134).
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
