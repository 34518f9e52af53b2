"""The lock on a run's directory, which belongs to one job at a time."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.config import Config
from megagrow.errors import TrainingError
from megagrow.files import write_atomically
from megagrow.lock import NAME, Lock, acquire, holding_output
from megagrow.train.health.agree import on_all, on_first

if TYPE_CHECKING:  # requires DeepSpeed
    from megagrow.engine.comm import Comm

RUN_ID = "run_id"  # a file in run.dir


class RunLock:
    """The lock of run.dir, held by rank 0 for the whole job.

    Args:
        comm: the job.
        lock: on rank 0; None on the others, and if no lock is needed.
    """

    def __init__(self, comm: Comm, lock: Lock | None = None) -> None:
        self._comm, self._lock = comm, lock

    def lost(self) -> bool:
        """Whether this rank has lost the lock."""
        return self._lock is not None and bool(self._lock.lost())

    def require(self) -> None:
        """Raise if the lock is lost; only rank 0 can detect it.

        Raises:
            LockError: it was lost: run.dir was removed, or another job took over.
        """
        if self._lock is not None:
            self._lock.require()

    def require_on_all(self) -> None:
        """Like `require`, on all ranks together."""
        on_first(self._comm, self.require)


@contextlib.contextmanager
def holding_run(config: Config, comm: Comm) -> Iterator[RunLock]:
    """Hold run.dir, creating it if needed, for the duration of the block; all ranks call together.

    Raises:
        LockError: on all ranks, if another job still holds it after `run.wait` seconds.
    """
    directory = Path(config.run.dir)
    locks: list[Lock] = []

    def take() -> bool:
        fresh = not directory.exists()
        locks.append(
            acquire(
                directory / NAME,
                of=f"run.dir = {directory}",
                wait=config.run.wait,
                elsewhere="set run.dir to another directory",
            )
        )
        return fresh

    fresh = on_all(comm, lambda: take() if comm.rank == 0 else False)
    try:
        yield RunLock(comm, *locks)
    finally:
        for lock in locks:
            lock.release()
        if fresh:  # a refused run leaves nothing behind
            with contextlib.suppress(OSError):
                directory.rmdir()


@contextlib.contextmanager
def holding_together(output: Path, comm: Comm | None) -> Iterator[None]:
    """Hold a command's output for all ranks, or for a single process.

    Raises:
        LockError: on all ranks, if another job holds it.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            held.enter_context(holding_output(output))

        if comm is None:
            take()
        else:
            on_first(comm, take)
        yield


def run_id(directory: Path, *, new: bool = False) -> str:
    """The run's globally unique random name; created if there is none.

    Args:
        directory: run.dir, which this job holds.
        new: always create one, because another run begins in the directory.

    Raises:
        TrainingError: its file holds something else.
        OSError: it cannot be read or written.
    """
    path = directory / RUN_ID
    if new or not path.exists():
        write_atomically(path, f"{secrets.token_hex(8)}\n".encode())
    found = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", found):
        raise TrainingError(
            f"{path}: not a valid run id",
            found=repr(found[:80]),
            expected="up to 64 letters, digits, - and _",
            fix=f"rm {path}: a new one is then created",
        )
    return found
