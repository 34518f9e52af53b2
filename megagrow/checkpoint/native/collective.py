"""The processes that save together, and how they agree on success or failure.

This package needs two collectives and a barrier; `Group` declares them, so that it depends on no
communication library.  Only `together` uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from megagrow.errors import CheckpointError, MegagrowError

T = TypeVar("T")
R = TypeVar("R")

_FAULTS_SHOWN = 4


class Group(Protocol):
    """The processes that call together; `gather` and `broadcast` are rooted at rank 0."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def world(self) -> int:
        """Number of processes."""

    def gather(self, obj: Any) -> list[Any] | None:
        """Every rank's object in rank order, on rank 0; None elsewhere."""

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's object, on every rank."""

    def barrier(self) -> None:
        """Return once every rank has called."""


class SoloGroup:
    """A single-process group."""

    rank = 0
    world = 1

    def gather(self, obj: Any) -> list[Any] | None:
        """A list with the one object."""
        return [obj]

    def broadcast(self, obj: Any) -> Any:
        """The object itself."""
        return obj

    def barrier(self) -> None:
        """Nothing to wait for."""


def together(
    group: Group,
    work: Callable[[], T],
    conclude: Callable[[list[T]], R],
    *,
    failing: str,
    undo: Callable[[], None],
) -> R:
    """Do work on every rank, then conclude on rank 0; all ranks succeed or all raise.

    Args:
        work: runs on each rank; its result goes to rank 0.
        conclude: turns all results into one on rank 0; every rank returns it.
        failing: what was not done; the start of the error message.
        undo: called on rank 0 after every rank has stopped working, if anything failed.

    Raises:
        CheckpointError: on every rank, if any rank raised an Exception.
    """
    value: T | None = None
    cause: Exception | None = None
    try:
        value = work()
    except Exception as error:  # a rank that raised without reporting it would hang the others
        cause = error
    reports = group.gather((value, None if cause is None else _text(cause)))
    verdict: tuple[R | None, str | None] = (None, None)
    if reports is not None:
        faults = [f"rank {r}: {fault}" for r, (_, fault) in enumerate(reports) if fault]
        if not faults:
            try:
                verdict = (conclude([value for value, _ in reports]), None)
            except Exception as error:
                cause = error
                faults = [f"rank 0: {_text(error)}"]
        if faults:
            undo()
            verdict = (None, _listed(faults))
    result, fault = group.broadcast(verdict)
    if fault is not None:
        raise CheckpointError(f"{failing}\n{fault}") from cause
    return result


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, MegagrowError) else f"{type(error).__name__}: {error}"


def _listed(faults: list[str]) -> str:
    rest = len(faults) - _FAULTS_SHOWN
    return "\n".join(faults[:_FAULTS_SHOWN] + ([f"and {rest} more ranks"] if rest > 0 else []))
