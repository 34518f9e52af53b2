"""Processes: which is which, as PIDs are reused; how one starts; how one that trained ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
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


class StartUp:
    """How long the parts of this process's start took, for the log of a run.

    Only a command that is a process of its own counts: elsewhere nothing has begun.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        """Count from when the process was made; that ends the part ``python``."""
        self._seconds, self._last = {}, _made()
        self.ends("python")

    def ends(self, part: str) -> None:
        """A part ends now; it began where the one before it ended."""
        if self._last is not None:
            now = time.time()
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
            self._last = now

    def take(self) -> dict[str, float]:
        """The parts in seconds, in order; the start is over, and nothing is counted any more."""
        seconds, self._seconds, self._last = self._seconds, {}, None
        return seconds


start_up = StartUp()


def _made() -> float | None:
    """When this process was made, in seconds since 1970; None where the system does not tell."""
    ticks = started(os.getpid())
    if ticks in (None, HIDDEN):
        return None
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))


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
