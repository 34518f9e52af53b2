"""Signals that ask a run to save and leave: SIGTERM, SIGUSR1 as schedulers send it ahead, Ctrl-C.

    while                          the first signal              a second Ctrl-C (SIGINT)
    it starts, up to its engine    ends it: nothing is lost      ends it at once
    the engine is made, training,  the next safe point: the      ends it at once, whatever it is
    validation, a save, a growth   state is saved, then it ends  doing; the last checkpoint stays

Safe points are the end of a step, of a validation, of a save, and of the first step after a
growth.  The exit status is 130 after Ctrl-C, as of any command that a person interrupts, and 75
after the others, on which schedulers start a job again.

Python runs a handler only between two instructions of the main thread, which may be in a
collective that never returns.  So a thread takes part: the system writes the number of every
signal to a socket of its own.
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
_ONE_PRESS = 0.5  # seconds: launchers and shells may pass on a Ctrl-C that came already
_UNWIND = 5.0  # seconds for a run that is still starting to end by itself


class StoppedWhileStarting(BaseException):
    """A signal came before the run had anything to save.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal_name(number))
        self.signal = number


class StopRequest:
    """Whether this rank was asked to stop; the ranks agree on it at safe points.

    Args:
        speaking: whether this is the rank that talks to the user.

    Attributes:
        signal: the number of the signal to act on, or 0: SIGINT if it came, else the first.
        deferring: whether there is a next safe point; else a signal ends the process.
        last_saved: the checkpoint that a run ended at once goes on from.
    """

    def __init__(self, *, speaking: bool = True) -> None:
        self.signal = 0
        self.deferring = False
        self.last_saved: Path | None = None
        self._speaking = speaking
        self._pressed = 0.0  # when Ctrl-C came first
        self._patience: float | None = None  # of the thread, after a signal that is not deferred

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals while it lasts; what they did before is put back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may take signals
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
        """In the main thread, as soon as Python gets to it."""
        self._note(number)
        if not self.deferring:
            raise StoppedWhileStarting(self.signal)

    def _note(self, number: int) -> None:
        if number == signal.SIGINT or not self.signal:
            self.signal = number

    # --- the thread -------------------------------------------------------------------------

    def _hear(self, numbers: socket.socket) -> bool:
        """Wait for signals and act on what cannot wait for the main thread; True at the end."""
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
        """Past Python's streams, which the main thread may hold."""
        if self._speaking:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


def agreed(signals: Iterable[float]) -> int:
    """The signal that all ranks act on, of what each of them heard: SIGINT before the others."""
    return int(min((number for number in signals if number), default=0))


def exit_status(number: int) -> int:
    """The status of a run that a signal ended; 0 without one."""
    if not number:
        return 0
    return STATUS_INTERRUPTED if number == signal.SIGINT else STATUS_STOPPED


def left(checkpoint: Path | None) -> str:
    """What a run that ended has to go on from, in words."""
    if checkpoint is None:
        return "it has no checkpoint, so the next start begins at step 0"
    return f"its last checkpoint is {checkpoint}, from which --resume auto goes on"


def signal_name(number: int) -> str:
    """For instance ``SIGTERM``."""
    return signal.Signals(number).name
