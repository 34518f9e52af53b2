"""Which process is which: machines and start times, since PIDs are reused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

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
