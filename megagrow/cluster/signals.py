"""Temporary signal handlers."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType


@contextlib.contextmanager
def taking(
    numbers: Iterable[int], heard: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Call `heard` for these signals within the block; restores the previous handlers afterwards.

    Raises:
        ValueError: not called in the main thread, the only one that may handle signals.
    """
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
