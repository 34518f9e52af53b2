"""Kill what is left of a job on this host: `python -m megagrow.cluster.kill_leftovers MARK`.

Every process of a job has the job's mark in its environment, and its children inherit it.
A name (`pkill -f pretrain.py`) would match other jobs, and miss processes that changed their name.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

VARIABLE = "MEGAGROW_JOB"


def marked(mark: str) -> list[int]:
    """This user's processes on this host that have the mark, except this one."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # already ended, or another user's
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def sweep(mark: str, *, seconds: float = 5.0) -> tuple[int, list[int]]:
    """SIGKILL all of them, including those that they start meanwhile.

    Returns:
        How many were killed, and which still exist when the time is up.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except (ProcessLookupError, PermissionError):
                pass
        time.sleep(0.05)
    return len(killed), left


if __name__ == "__main__":
    COUNT, LEFT = sweep(sys.argv[1])
    if COUNT:
        print(f"ended {COUNT} processes")
    sys.exit(1 if LEFT else 0)
