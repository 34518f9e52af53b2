"""Work that may fail on some ranks only: all ranks then fail together, and none hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # requires DeepSpeed
    from megagrow.engine.comm import Comm

T = TypeVar("T")


def on_all(comm: Comm, work: Callable[[], T]) -> T:
    """Run work on every rank; returns this rank's result.

    Raises:
        Exception: the rank's own if it failed; otherwise a MegagrowError with another rank's.
    """
    results: list[T] = []
    failure: Exception | None = None
    try:
        results.append(work())
    except Exception as error:
        failure = error
    comm.agree(failure)
    return results[0]


def on_first(comm: Comm, work: Callable[[], T]) -> T:
    """Run work on rank 0 alone; every rank returns its result, a small object.

    Raises:
        Exception: as `on_all`.
    """
    result = on_all(comm, lambda: work() if comm.rank == 0 else None)
    shared: T = comm.broadcast(result)
    return shared
