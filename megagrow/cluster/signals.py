"""Signals, taken for a while."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType


@contextlib.contextmanager
def taking(
    numbers: Iterable[int], heard: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Call `heard` for these signals while it lasts; what they did before is put back afterwards.

    Raises:
        ValueError: not in the main thread, which alone may take signals.
    """
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
