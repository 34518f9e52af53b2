"""Rank 0 checks a dataset's checksums in the background while the job starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megagrow.background import Task
from megagrow.config import Config
from megagrow.data.run_data import RunData
from megagrow.engine.comm import Comm
from megagrow.errors import DataError
from megagrow.train.health.agree import on_first


class DataCheck:
    """Reads a whole dataset once if `data.verify` is on; starts at once.

    The thread ends with the process, so only `settle` waits for it.
    """

    def __init__(self, *, config: Config, data: RunData, comm: Comm) -> None:
        self._wanted, self._data, self._comm = config.data.verify, data, comm
        self._seconds = min(10.0, config.watch.slow / 4)
        here = self._wanted and comm.rank == 0
        self._work = Task("checksums", self._compare) if here else None

    def _compare(self) -> str:
        begin = time.perf_counter()
        size = self._data.verify()
        seconds = time.perf_counter() - begin
        return f"data: {size / 1e6:,.1f} MB agree with their checksums ({seconds:.1f} s)"

    def settle(self, begin: Callable[[str], object]) -> str:
        """Wait for the check to finish; all ranks call together.

        Args:
            begin: called repeatedly with what the run is doing.

        Returns:
            The result, in words.

        Raises:
            DataError: on all ranks, if a file differs from its checksum.
        """
        if not self._wanted:
            return "data.verify is off: the data's checksums are not compared"
        done = False
        while not done:
            begin("comparing the dataset's checksums")
            done = self._comm.broadcast(self._work is not None and self._work.wait(self._seconds))
        return on_first(self._comm, self._found)

    def _found(self) -> str:
        assert self._work is not None
        return self._work.result()


@contextmanager
def reported_by_its_rank(comm: Comm) -> Iterator[None]:
    """Print an error in one rank's samples on that rank, since no other rank sees it."""
    try:
        yield
    except DataError as error:
        if comm.rank > 0:
            print(f"error: rank {comm.rank}: {error}", file=sys.stderr, flush=True)
        raise
