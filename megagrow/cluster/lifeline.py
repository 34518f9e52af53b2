"""The lifeline: a TCP connection from every rank to the supervisor of its job.

A launcher's exit status says little: a killed pdsh looks like success, an unreachable host looks
like a slow one.  So every rank reports to the supervisor directly what it does and how it ended,
and the supervisor can reach every rank without ssh.  Each end notices when the other is gone:
the system closes the connection of a process that dies, and both send an empty line every few
seconds, whose absence reveals a host that is unreachable, frozen or without power.

Each message is one line of JSON.  From a rank: ``start`` (rank, world, host, pid), ``beat`` (step,
doing), ``saved`` (step) and one last word: ``done``, ``stopped`` (saved after a signal) or
``failed`` (text).  From the supervisor: ``welcome`` (ping and silence, in seconds), ``stop``
(signal) and ``end`` (reason).

This is the rank's end; the supervisor's is `megagrow.cluster.lifeline_server`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from megagrow import background
from megagrow.errors import MegagrowError

VARIABLE = "MEGAGROW_LIFELINE"  # host:port:token, in the environment of every rank
STATUS_STOPPED = 75  # sysexits.h: a temporary failure; schedulers restart such a job
STATUS_INTERRUPTED = 130  # as in shells: ended by Ctrl-C
LAST_WORDS = frozenset({"done", "stopped", "failed"})

_CONNECT_SECONDS = 15.0
_FLUSH_SECONDS = 2.0  # time for a last word to be sent
_WAITING_LINES = 1000  # send queue of a stalled connection; older lines are dropped
_TEXT = 16_000  # characters of one field
# Until the supervisor's welcome sets them.
_PING, _SILENCE = 2.0, 60.0


class Lifeline:
    """A rank's end of the connection, served by its own thread.

    Args:
        connection: connected to the supervisor.
        hello: the first message, with the token.
        on_lost: called in the lifeline's thread, with the reason, when the supervisor is gone;
            the rank must then end within seconds, since nothing monitors or ends it any more.
        on_stop: called in the lifeline's thread, with a signal's number, when the supervisor
            passes that signal on.
        on_end: called in the lifeline's thread, with the reason, when the supervisor ends the job.
        on_other: called in the lifeline's thread with any other message.
    """

    def __init__(
        self,
        connection: socket.socket,
        hello: dict[str, Any],
        *,
        on_lost: Callable[[str], None] | None = None,
        on_stop: Callable[[int], None] | None = None,
        on_end: Callable[[str], None] | None = None,
        on_other: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.on_lost = on_lost or self._leave
        self.on_stop = on_stop or self._take_signal
        self.on_end = on_end or self._leave
        self.on_other = on_other
        self.last_word: str | None = None
        self._connection = connection
        self._connection.setblocking(False)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._waiting: deque[bytes] = deque(maxlen=_WAITING_LINES)
        self._flushed = threading.Condition()
        self._unsent = b""
        self._closing = False
        self._ping, self._silence = _PING, _SILENCE
        self._queue(hello)
        self._thread = background.Loop("lifeline", self._serve, every=0.0)
        self._thread.start()
        # A forked child that held the connection open would hide this rank's death.
        os.register_at_fork(after_in_child=self._forget)

    @classmethod
    def from_environment(cls) -> Lifeline | None:
        """This process's lifeline, connected on the first call; None without a supervisor.

        Raises:
            MegagrowError: the supervisor cannot be reached, or its address is malformed.
        """
        global _current
        if _current is None and VARIABLE in os.environ:
            host, port, token = address_of(os.environ[VARIABLE])
            _current = cls(_connect(host, port), {"token": token, "event": "start"} | _identity())
        return _current

    def say(self, event: str, **fields: Any) -> None:
        """Send a message to the supervisor; never raises, and returns at once.

        Only the last words (done, stopped, failed) wait until they have been sent, for two seconds
        at most, because the process may end right after.
        """
        with contextlib.suppress(Exception):
            if event in LAST_WORDS and self.last_word is None:
                self.last_word = event
            self._queue({"event": event} | fields)
            if event in LAST_WORDS:
                self._flush()

    def close(self) -> None:
        """Send what is queued, and close; closing is not reported as a loss."""
        with contextlib.suppress(Exception):
            self._flush()
            self._closing = True
            self._wake()
            if not self._thread.is_current():
                self._thread.join(_FLUSH_SECONDS)

    # --- sending --------------------------------------------------------------------------

    def _queue(self, message: dict[str, Any]) -> None:
        short = {k: v[:_TEXT] if isinstance(v, str) else v for k, v in message.items()}
        self._waiting.append(json.dumps(short, default=str).encode() + b"\n")
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # buffer full: it is awake already
            os.write(self._wake_write, b"x")

    def _flush(self) -> None:
        if self._thread.is_current():
            with contextlib.suppress(OSError):
                self._send()
            return
        with self._flushed:
            self._flushed.wait_for(
                lambda: not (self._waiting or self._unsent) or not self._thread.is_alive(),
                timeout=_FLUSH_SECONDS,
            )

    def _send(self) -> None:
        """Send queued data, as far as the socket accepts it."""
        while self._unsent or self._waiting:
            self._unsent = self._unsent or self._waiting.popleft()
            try:
                sent = self._connection.send(self._unsent)
            except BlockingIOError:
                return
            self._unsent = self._unsent[sent:]
        with self._flushed:
            self._flushed.notify_all()

    # --- the thread -----------------------------------------------------------------------

    def _serve(self) -> bool:
        """One iteration of the thread; True, unless `on_lost` fails and has to be called again."""
        try:
            reason = self._exchange()
        except OSError as error:
            reason = f"the line to the supervisor broke: {error.strerror or error}"
        except Exception as error:  # a bug here must not leave a rank that nothing can end
            background.report("the lifeline", error, then="this rank loses its supervisor")
            reason = f"the lifeline failed: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            self._connection.close()
        with self._flushed:
            self._flushed.notify_all()
        if reason is not None and self.last_word not in ("done", "stopped"):
            self.on_lost(reason)
        return True

    def _exchange(self) -> str | None:
        """Run the connection until this end closes (None) or the supervisor is gone (why)."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        heard = pinged = time.monotonic()
        received = b""
        while not self._closing:
            wanted = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            poll.register(self._connection, wanted)
            ready = dict(poll.poll(min(self._ping, self._silence) * 500))
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            if ready.get(self._connection.fileno(), 0) & ~select.POLLOUT:
                fresh = self._connection.recv(65536)
                if not fresh:
                    return "the supervisor is gone"
                heard = time.monotonic()
                *lines, received = (received + fresh).split(b"\n")
                for line in filter(None, lines):
                    self._obey(json.loads(line))
            now = time.monotonic()
            if now - heard > self._silence:
                return f"nothing was heard from the supervisor for {now - heard:.0f} s"
            if now - pinged >= self._ping and not (self._unsent or self._waiting):
                pinged = now
                self._waiting.append(b"\n")
            self._send()
        return None

    def _obey(self, order: dict[str, Any]) -> None:
        event = order.get("event")
        if event == "welcome":
            self._ping, self._silence = float(order["ping"]), float(order["silence"])
        elif event == "stop":
            self.on_stop(int(order["signal"]))
        elif event == "end":
            self.on_end(str(order.get("reason", "the supervisor ends the job")))
        elif self.on_other is not None:
            self.on_other(order)

    # --- defaults -------------------------------------------------------------------------

    def _leave(self, reason: str) -> None:
        """End this process at once, since its main thread may hang in a collective."""
        with contextlib.suppress(Exception):
            rank = os.environ.get("RANK", "0")
            print(f"rank {rank}: {reason}; this rank ends", file=sys.stderr, flush=True)
        os._exit({"done": 0, "stopped": STATUS_STOPPED}.get(self.last_word or "", 1))

    def _take_signal(self, number: int) -> None:
        """Send the signal to this process; if nothing handles it yet, nothing is trained yet."""
        if signal.getsignal(number) is not signal.SIG_DFL:
            os.kill(os.getpid(), number)
            return
        self.say("stopped", text="before training began")
        os._exit(STATUS_STOPPED)

    def _forget(self) -> None:
        """In a forked child, which is not a rank."""
        global _current
        _current = None
        with contextlib.suppress(OSError):
            os.close(self._connection.detach())


_current: Lifeline | None = None


def say(event: str, **fields: Any) -> None:
    """Send a message to this process's supervisor, if there is one."""
    if _current is not None:
        _current.say(event, **fields)


def address_of(text: str) -> tuple[str, int, str]:
    """Parse ``host:port:token``; the host may be an IPv6 address.

    Raises:
        MegagrowError: it does not have that form.
    """
    host, _, rest = text.rpartition(":")
    host, _, port = host.rpartition(":")
    if not (host and rest and port.isdecimal() and 0 < int(port) < 65536):
        raise MegagrowError(
            f"{VARIABLE} is not an address",
            found=f"{len(text)} characters with {text.count(':')} colons",
            expected="host:port:token",
            fix=f"start the job by launch/supervise.py, which sets it, or unset {VARIABLE}",
        )
    return host.strip("[]"), int(port), rest


def connect(host: str, port: int, *, seconds: float) -> socket.socket:
    """Connect, retrying until the time is up.

    Raises:
        OSError: the last failure.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=min(5.0, seconds))
            # Connecting to a port without a listener may, by chance, connect to itself.
            if connection.getsockname() == connection.getpeername():
                connection.close()
                raise ConnectionRefusedError("nobody listens")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _connect(host: str, port: int) -> socket.socket:
    try:
        return connect(host, port, seconds=_CONNECT_SECONDS)
    except OSError as error:
        raise MegagrowError(
            f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: "
            "the supervisor of this job cannot be reached",
            found=f"{host}:{port}: {error.strerror or error}",
            expected="the supervisor that started this rank",
            fix="see whether it still runs; let the hosts reach each other on that port "
            "(--port chooses it)",
        ) from error


def _identity() -> dict[str, Any]:
    return {
        "rank": int(os.environ.get("RANK", "0")),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
