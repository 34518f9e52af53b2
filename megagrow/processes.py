"""Processes: which is which, since PIDs are reused, and how one that trained ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

HIDDEN = -1  # the start time of a process that exists, but cannot be inspected


def machine() -> str:
    """Identifies this boot of this machine and this PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def started(pid: int) -> int | None:
    """The start time of a process on this machine, in ticks; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return HIDDEN
        except OSError:
            return None
        return HIDDEN
    fields = text.rpartition(")")[2].split()  # the name in parentheses may contain anything
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie no longer writes


def leave(status: int) -> NoReturn:
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
