"""A dataset's checksums, compared by rank 0 beside what the job does to start."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

from megagrow.config import Config
from megagrow.data.dataset import PreparedData, verify
from megagrow.engine.comm import Comm
from megagrow.errors import DataError
from megagrow.train.agree import on_first


class DataCheck:
    """Reads all of a dataset once, where `data.verify` is on; begins at once.

    The thread ends with the process, so nothing waits for it but `settle`.
    """

    def __init__(self, *, config: Config, data: PreparedData, comm: Comm) -> None:
        self._wanted, self._data, self._comm = config.data.verify, data, comm
        self._seconds = min(10.0, config.watch.slow / 4)
        self._done: Future[str] = Future()
        if self._wanted and comm.rank == 0:
            threading.Thread(target=self._work, name="checksums", daemon=True).start()

    def _work(self) -> None:
        begin = time.perf_counter()
        try:
            size = verify(self._data)
        except BaseException as error:
            self._done.set_exception(error)
        else:
            seconds = time.perf_counter() - begin
            self._done.set_result(
                f"data: {size / 1e6:,.1f} MB agree with their checksums ({seconds:.1f} s)"
            )

    def settle(self, begin: Callable[[str], object]) -> str:
        """Wait for the end; all ranks call together.

        Args:
            begin: is told again and again that this is what the run does.

        Returns:
            What was found, in words.

        Raises:
            DataError: on all ranks, if a file differs from its checksum.
        """
        if not self._wanted:
            return "data.verify is off: the data's checksums are not compared"
        done = False
        while not done:
            begin("comparing the dataset's checksums")
            mine = self._comm.rank == 0 and bool(wait([self._done], self._seconds).done)
            done = self._comm.broadcast(mine)
        return on_first(self._comm, self._done.result)


@contextmanager
def told_by_its_rank(comm: Comm) -> Iterator[None]:
    """A fault of the samples of one rank is printed there: no other meets it."""
    try:
        yield
    except DataError as error:
        if comm.rank > 0:
            print(f"error: rank {comm.rank}: {error}", file=sys.stderr, flush=True)
        raise
