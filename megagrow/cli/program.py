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
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process and skip the interpreter's teardown.

    There, communication threads of PyTorch may outlive the objects they use and abort a job that
    has already finished ("terminate called without an active exception", status 134).
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
