"""The job's key-value store, with operations that end in time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from megagrow.background import Task

T = TypeVar("T")

_GRACE = 2.0  # seconds beyond the store's own timeout


class BoundedStore:
    """A `torch.distributed.Store`; an operation takes its timeout and a little more at most.

    PyTorch's TCPStore heeds its timeout only while it waits for a key.  Where the cable is cut, an
    operation waits until the system gives up the connection, a quarter of an hour later: with a
    timeout of 5 s, `check` and `get` were still waiting after 100 s.

    Args:
        store: on a connection that belongs to the caller; safe to use from any thread.
        seconds: timeout of an operation.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        store.set_timeout(timedelta(seconds=seconds))
        self._store, self._seconds = store, seconds
        self._stuck: Task[Any] | None = None

    def set(self, key: str, value: str) -> None:
        """Set a value; raises OSError, as all operations do, if the store's host is cut off."""
        self._do(lambda: self._store.set(key, value))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Values of keys, waiting for those that do not exist yet."""
        return self._do(lambda: list(self._store.multi_get(list(keys))))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys exist."""
        return self._do(lambda: bool(self._store.check(list(keys))))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set `desired` if the key has `expected` or is new; returns the resulting value."""
        return self._do(lambda: bytes(self._store.compare_set(key, expected, desired)))

    def gather(self, name: str, item: Any, *, rank: int, world: int) -> list[Any] | None:
        """Gather an object that JSON can express from every rank on rank 0; None elsewhere."""
        self.set(f"{name}/{rank}", json.dumps(item))
        if rank > 0:
            return None
        return [json.loads(v) for v in self.multi_get([f"{name}/{r}" for r in range(world)])]

    def broadcast(self, name: str, item: Any, *, rank: int) -> Any:
        """Rank 0's object on every rank."""
        if rank == 0:
            self.set(name, json.dumps(item))
            return item
        return json.loads(self.multi_get([name])[0])

    def _do(self, operation: Callable[[], T]) -> T:
        if self._stuck is not None and not self._stuck.done():
            raise OSError("the host of the job's store does not answer")
        self._stuck = None
        task = Task("store", operation)
        if not task.wait(self._seconds + _GRACE):
            self._stuck = task
            raise OSError(f"the host of the job's store did not answer within {self._seconds:g} s")
        return task.result()
