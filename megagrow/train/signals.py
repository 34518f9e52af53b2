"""Signals that ask a run to save and leave: SIGTERM, and SIGUSR1 as schedulers send ahead of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from megagrow.cluster.signals import taking

ASKING = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this rank was asked to stop; the ranks agree on it once a step.

    Attributes:
        signal: the number of the signal that came first, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals while it lasts; what they did before is put back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may take signals
            return
        with taking(ASKING, self._heard):
            yield self

    def _heard(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number


def signal_name(number: int) -> str:
    """For instance ``SIGTERM``."""
    return signal.Signals(number).name
