"""A log for each rank, so that rank 0's output on the terminal stays readable."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import IO

from megagrow.background import Loop

VARIABLE = "MEGAGROW_LOGS"  # a directory, in the environment of every rank
_OUTPUT_SECONDS = 2.0


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


class Console:
    """A pipe that passes what is written into it on to this process's stdout and to a log.

    Args:
        logs: the directory of console.log, or None.

    Attributes:
        path: of the end to write to, for the processes that this one starts.
    """

    def __init__(self, logs: Path | None) -> None:
        self._logs = logs
        self._log: IO[bytes] | None = None
        read, self._write = os.pipe()
        self._output = os.fdopen(read, "rb")
        self.path = f"/proc/{os.getpid()}/fd/{self._write}"
        # Whatever happens to a line, keep reading: a full pipe would block the job.
        self._pump = Loop("console", self._pass_on, every=0.0)

    def __enter__(self) -> Console:
        return self

    def started(self, *, first: bool) -> None:
        """The processes have the pipe; the `first` node, which has rank 0, writes the log."""
        if first and self._logs is not None:
            with contextlib.suppress(OSError):
                self._log = (self._logs / "console.log").open("ab")
        self._close()
        self._pump.start()

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._pump.is_alive():
            self._pump.join(_OUTPUT_SECONDS)

    def _close(self) -> None:
        if self._write >= 0:
            os.close(self._write)
            self._write = -1

    def _pass_on(self) -> bool:
        """Forward one line; True after the last one."""
        line = self._output.readline()
        if not line:
            self._output.close()
            if self._log is not None:
                self._log.close()
            return True
        for stream in filter(None, (sys.stdout.buffer, self._log)):
            try:
                stream.write(line)
                stream.flush()
            except (OSError, ValueError) as error:
                self._pump.faults.note(error, doing="passing on a line, which is lost")
        return False
