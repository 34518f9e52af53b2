"""The lifeline: a TCP connection from every rank and every node to the supervisor of its job.

A launcher's exit status says little: a killed pdsh looks like success, an unreachable host looks
like a slow one.  So every rank reports to the supervisor directly what it does and how it ended,
and the supervisor can reach every rank without ssh.  Each end notices when the other is gone:
the system closes the connection of a process that dies, and both send a sign of life every few
seconds, whose absence reveals a host that is unreachable, frozen or without power.

From a rank: ``start`` (rank, world, host, pid, attempt), ``beat`` (step, doing), ``saved`` (step)
and one last word: ``done``, ``stopped`` (saved after a signal) or ``failed`` (text).  From the
supervisor: ``welcome`` (ping and silence, in seconds), ``stop`` (signal) and ``end`` (reason).
What nodes and their supervisor say to each other is in `megagrow.cluster.agent`.

This is the peer's end; the supervisor's is `megagrow.cluster.hub`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from megagrow import background
from megagrow.cluster import wire
from megagrow.errors import ConfigError, MegagrowError

VARIABLE = "MEGAGROW_LIFELINE"  # host:port of the supervisor, in the environment of every rank
ATTEMPT = "MEGAGROW_ATTEMPT"  # which one this rank belongs to
STATUS_STOPPED = 75  # sysexits.h: a temporary failure; schedulers restart such a job
STATUS_INTERRUPTED = 130  # as in shells: ended by Ctrl-C
USAGE = "usage"  # the kind of error of a command line that is wrong
LAST_WORDS = frozenset({"done", "stopped", "failed"})

_CONNECT_SECONDS = 15.0
_GREET_SECONDS = 10.0  # for both proofs
_FLUSH_SECONDS = 2.0  # time for a last word to arrive
_TEXT = 16_000  # characters of one field
# Until the supervisor's welcome sets them.
_PING, _SILENCE = 2.0, 60.0


class StrangerError(Exception):
    """The other side does not know the job's secret."""


class Lifeline:
    """A peer's end of the connection, read by its own thread.

    Args:
        connection: connected to the supervisor.
        secret: of the job.
        hello: the first message.
        on_lost: called in the lifeline's thread, with the reason, when the supervisor is gone;
            the process must then end within seconds, since nothing monitors or ends it any more.
        on_stop: called there with a signal's number, when the supervisor passes that signal on.
        on_end: called there with the reason, when the supervisor ends the job.
        on_other: called there with any other message.

    Raises:
        StrangerError: the other side does not know the secret.
        OSError: the connection broke.
    """

    def __init__(
        self,
        connection: socket.socket,
        secret: bytes,
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
        self._connection, self._sending = connection, threading.RLock()
        self._splitter, self._seal = _greet(connection, secret)
        self._closing = False
        self._ping, self._silence = _PING, _SILENCE
        self._numbers, self._answers = itertools.count(), dict[int, queue.SimpleQueue[Any]]()
        self._thread = background.Loop("lifeline", self._serve, every=0.0)
        connection.settimeout(1.0)
        self._send(hello)
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
            host, port = address_of(os.environ[VARIABLE])
            _current = connect(
                host, port, secret=_secret(os.environ), seconds=_CONNECT_SECONDS,
                hello={"event": "start"} | _identity(),
                who=f"rank {os.environ.get('RANK', '0')}",
            )  # fmt: skip
        return _current

    def say(self, event: str, **fields: Any) -> None:
        """Send a message to the supervisor; never raises, and takes a second at most."""
        with contextlib.suppress(Exception):
            if event in LAST_WORDS and self.last_word is None:
                self.last_word = event
            short = {k: v[:_TEXT] if isinstance(v, str) else v for k, v in fields.items()}
            self._send({"event": event} | short)

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """The supervisor's answer; not from the lifeline's own thread.

        Raises:
            OSError: the connection broke, or there was no answer in time.
        """
        number, box = next(self._numbers), queue.SimpleQueue[Any]()
        self._answers[number] = box
        try:
            self._send({"ask": question, "number": number} | fields)
            answer: dict[str, Any] | None = box.get(timeout=self._silence)
        except queue.Empty:
            answer = None
        finally:
            del self._answers[number]
        if answer is None:
            raise OSError(f"the supervisor does not answer: {question}")
        return answer

    def close(self) -> None:
        """Wait until what was sent has arrived, and close; this is not reported as a loss."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        if not self._thread.is_current():
            self._thread.join(_FLUSH_SECONDS)

    def _send(self, message: dict[str, Any] | None) -> None:
        with self._sending:
            try:
                self._connection.sendall(self._seal.wrap(message))
            except OSError:
                # A part of a message may have been sent: nothing can follow it.
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
                raise

    # --- the thread -----------------------------------------------------------------------

    def _serve(self) -> bool:
        """One iteration of the thread; True, unless `on_lost` fails and has to be called again."""
        try:
            reason = self._exchange()
        except ConnectionResetError:  # its process ended with words of ours unread
            reason = "the supervisor is gone"
        except OSError as error:
            reason = f"the line to the supervisor broke: {error.strerror or error}"
        except Exception as error:  # a bug here must not leave a rank that nothing can end
            background.report("the lifeline", error, then="this rank loses its supervisor")
            reason = f"the lifeline failed: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            self._connection.close()
        for box in list(self._answers.values()):
            box.put(None)
        if not self._closing and self.last_word not in ("done", "stopped"):
            self.on_lost(reason)
        return True

    def _exchange(self) -> str:
        """Read until the supervisor is gone; returns why."""
        heard = pinged = time.monotonic()
        while True:
            try:
                fresh = self._connection.recv(65536)
                if not fresh:
                    return "the supervisor is gone"
                heard = time.monotonic()
                for message in self._splitter.feed(fresh):
                    if message is not None:
                        self._obey(message)
            except TimeoutError:
                pass
            now = time.monotonic()
            if now - heard > self._silence:
                return f"nothing was heard from the supervisor for {now - heard:.0f} s"
            if now - pinged >= self._ping and not self._closing:
                pinged = now
                self._send(None)

    def _obey(self, order: dict[str, Any]) -> None:
        event = order.get("event")
        if event == "answer":
            box = self._answers.get(order["number"])
            if box is not None:
                box.put(order)
        elif event == "welcome":
            self._ping, self._silence = float(order["ping"]), float(order["silence"])
            self._connection.settimeout(min(1.0, self._ping / 2, self._silence / 2))
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
        self.close()
        os._exit(STATUS_STOPPED)

    def _forget(self) -> None:
        """In a forked child, which is not a rank."""
        global _current
        _current = None
        with contextlib.suppress(OSError):
            os.close(self._connection.detach())


_current: Lifeline | None = None


def connected() -> bool:
    """Whether this process has a supervisor that hears it."""
    return _current is not None


def say(event: str, **fields: Any) -> None:
    """Send a message to this process's supervisor, if there is one."""
    if _current is not None:
        _current.say(event, **fields)


def connect(
    host: str,
    port: int,
    *,
    secret: bytes,
    hello: dict[str, Any],
    seconds: float,
    who: str,
    **handlers: Callable[..., None],
) -> Lifeline:
    """Connect to a supervisor, retrying until the time is up.

    Args:
        who: this process, for messages.
        handlers: as for `Lifeline`.

    Raises:
        MegagrowError: it cannot be reached, or does not know the secret.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return Lifeline(_connected(host, port), secret, hello, **handlers)
        except StrangerError as error:
            raise MegagrowError(
                f"{who} on {socket.gethostname()}: what answers at {host}:{port} is not the "
                "supervisor of this job",
                found="it does not know the job's secret",
                expected=f"the same {wire.SECRET} on all nodes of a job",
                fix="give all nodes the same one, and each job a port of its own",
            ) from error
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise MegagrowError(
                f"{who} on {socket.gethostname()}: the supervisor of this job cannot be reached",
                found=f"{host}:{port}: {error.strerror or error}",
                expected="the supervisor that this process belongs to",
                fix="see whether it still runs; let the hosts reach each other on that port "
                "(--port or --master chooses it)",
            ) from error


def address_of(text: str) -> tuple[str, int]:
    """Parse ``host:port``; the host may be an IPv6 address.

    Raises:
        MegagrowError: it does not have that form.
    """
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise MegagrowError(
            f"{VARIABLE} is not an address",
            found=text,
            expected="host:port",
            fix=f"start the job by launch/supervise.py, which sets it, or unset {VARIABLE}",
        )
    return host.strip("[]"), int(port)


def _connected(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=5.0)
    # Connecting to a port without a listener may, by chance, connect to itself.
    if connection.getsockname() == connection.getpeername():
        connection.close()
        raise ConnectionRefusedError("nobody listens")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _greet(connection: socket.socket, secret: bytes) -> tuple[wire.Splitter, wire.Seal]:
    """Exchange proofs with the supervisor."""
    deadline = time.monotonic() + _GREET_SECONDS
    try:
        theirs = _exactly(connection, wire.NONCE, deadline)
        nonces = theirs + (mine := os.urandom(wire.NONCE))
        connection.sendall(mine + wire.proof(secret, "peer", nonces))
        shown = _exactly(connection, wire.PROOF, deadline)
        if not wire.proves(shown, secret, "supervisor", nonces):
            raise StrangerError
    except BaseException:
        connection.close()
        raise
    incoming = wire.Seal(secret, "supervisor", nonces)
    return wire.Splitter(incoming), wire.Seal(secret, "peer", nonces)


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    got = b""
    while len(got) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        fresh = connection.recv(count - len(got))
        if not fresh:
            raise ConnectionResetError("it hung up")
        got += fresh
    return got


def _secret(environ: Mapping[str, str]) -> bytes:
    secret = wire.secret_of(environ)
    if secret is None:
        raise ConfigError(
            f"{VARIABLE} is set, but the job's secret is not",
            found=f"neither {wire.SECRET} nor {wire.SECRET_FILE} in the environment",
            expected="what launch/supervise.py sets",
            fix=f"start the job by launch/supervise.py, or unset {VARIABLE}",
        )
    return secret


def _identity() -> dict[str, Any]:
    return {
        "rank": int(os.environ.get("RANK", "0")),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "attempt": int(os.environ.get(ATTEMPT, "1")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
