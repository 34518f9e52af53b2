"""A log for each rank, so that rank 0's words on the terminal stay readable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "MEGAGROW_LOGS"  # a directory, in the environment of every rank


def name(rank: int) -> str:
    """Of a rank's log."""
    return f"rank_{rank:05}.log"


def divert_output() -> Path | None:
    """Send what this rank and its children write to its own log; rank 0 keeps the terminal.

    Done on the level of the system, so that C++ libraries and the traces of a crash go along.

    Returns:
        The log, or None for rank 0, without a supervisor, or where it cannot be written.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or VARIABLE not in os.environ:
        return None
    path = Path(os.environ[VARIABLE]) / name(rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"rank {rank}: no log of its own: {path}: {error.strerror}", file=sys.stderr)
        return None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return path
