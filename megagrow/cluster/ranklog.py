"""A log for each rank, so that rank 0's output on the terminal stays readable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "MEGAGROW_LOGS"  # a directory, in the environment of every rank


def name(rank: int) -> str:
    """The name of a rank's log."""
    return f"rank_{rank:05}.log"


def divert_output() -> Path | None:
    """Redirect the output of this rank and its children to its own log, except on rank 0.

    Works on file descriptors, so that C++ libraries and crash traces are included.

    Returns:
        The log, or None for rank 0, without a supervisor, or if it cannot be written.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or VARIABLE not in os.environ:
        return None
    path = Path(os.environ[VARIABLE]) / name(rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"rank {rank}: cannot open its log: {path}: {error.strerror}", file=sys.stderr)
        return None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return path
