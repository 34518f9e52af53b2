"""Signals that make a run save and exit: SIGTERM, SIGUSR1 (from schedulers) and Ctrl-C.

    during                         the first signal              a second Ctrl-C (SIGINT)
    start-up, before the engine    ends it: nothing is lost      ends it at once
    engine creation, training,     at the next safe point the    ends it at once, whatever it is
    validation, a save, a growth   state is saved; then it ends  doing; the last checkpoint stays

Safe points are the end of a step, of a validation, of a save, and of the first step after a
growth.  The exit status is 130 after Ctrl-C, as for any interrupted command, and 75 after the
other signals, upon which schedulers restart a job.

Python runs a handler only between two instructions of the main thread, which may be in a
collective that never returns.  A thread therefore helps: the system writes the number of every
signal to a socket that it reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from megagrow.background import Loop
from megagrow.cluster.lifeline import STATUS_INTERRUPTED, STATUS_STOPPED
from megagrow.cluster.signals import taking

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ONE_PRESS = 0.5  # seconds: launchers and shells may pass on a Ctrl-C that has already arrived
_UNWIND = 5.0  # seconds for a run that is still starting to end by itself


class StoppedWhileStarting(BaseException):
    """A signal arrived before the run had anything to save.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal_name(number))
        self.signal = number


class StopRequest:
    """Whether this rank was asked to stop; the ranks agree on it at safe points.

    Args:
        speaking: whether this rank talks to the user.

    Attributes:
        signal: the number of the signal to act on, or 0: SIGINT if received, else the first.
        deferring: whether there is a next safe point; else a signal ends the process.
        last_saved: the checkpoint from which a run that ends at once can resume.
    """

    def __init__(self, *, speaking: bool = True) -> None:
        self.signal = 0
        self.deferring = False
        self.last_saved: Path | None = None
        self._speaking = speaking
        self._pressed = 0.0  # when Ctrl-C first arrived
        self._patience: float | None = None  # after a signal that is not deferred

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals within the block; restores the previous handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may handle signals
            return
        numbers, written = socket.socketpair()
        written.setblocking(False)
        with numbers, written, taking(ASKING, self._heard):
            before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
            listener = Loop("megagrow-signals", lambda: self._hear(numbers), every=0.0)
            listener.start()
            try:
                yield self
            finally:
                signal.set_wakeup_fd(before)
                written.shutdown(socket.SHUT_WR)
                listener.join()

    def _heard(self, number: int, _: FrameType | None) -> None:
        """Runs in the main thread, as soon as Python gets to it."""
        self._note(number)
        if not self.deferring:
            raise StoppedWhileStarting(self.signal)

    def _note(self, number: int) -> None:
        if number == signal.SIGINT or not self.signal:
            self.signal = number

    # --- the thread -------------------------------------------------------------------------

    def _hear(self, numbers: socket.socket) -> bool:
        """Wait for signals; act on those that cannot wait for the main thread; True at the end."""
        numbers.settimeout(self._patience)
        try:
            heard = numbers.recv(64)
        except TimeoutError:
            if not self.deferring:
                os._exit(exit_status(self.signal))
            self._patience = None
            return False
        for number in heard:
            if number not in ASKING:
                continue
            self._note(number)
            if number == signal.SIGINT:
                self._interrupted()
            if not self.deferring:
                self._patience = _UNWIND
        return not heard

    def _interrupted(self) -> None:
        now = time.monotonic()
        if self._pressed and now - self._pressed < _ONE_PRESS:
            return
        if self._pressed:
            self._say(f"Ctrl-C again: ended at once, without saving; {left(self.last_saved)}")
            os._exit(STATUS_INTERRUPTED)
        self._pressed = now
        if self.deferring:
            self._say(
                "Ctrl-C: what is under way is finished, the state saved, then the run ends; "
                "Ctrl-C again ends it at once, without saving"
            )

    def _say(self, text: str) -> None:
        """Bypass Python's streams, whose locks the main thread may hold."""
        if self._speaking:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


def agreed(signals: Iterable[float]) -> int:
    """The signal that all ranks act on, given what each received: SIGINT before the others."""
    return int(min((number for number in signals if number), default=0))


def exit_status(number: int) -> int:
    """The exit status of a run that a signal ended; 0 without one."""
    if not number:
        return 0
    return STATUS_INTERRUPTED if number == signal.SIGINT else STATUS_STOPPED


def left(checkpoint: Path | None) -> str:
    """The checkpoint that an ended run can resume from, in words."""
    if checkpoint is None:
        return "it has no checkpoint, so the next start begins at step 0"
    return f"its last checkpoint is {checkpoint}, from which --resume auto continues"


def signal_name(number: int) -> str:
    """For instance ``SIGTERM``."""
    return signal.Signals(number).name
