"""The supervisor's end of all lifelines: one socket, one thread, thousands of peers."""

from __future__ import annotations

import contextlib
import hmac
import json
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from megagrow.errors import MegagrowError

_LINE = 1 << 16  # maximum bytes of one message, and of what is queued for a peer that does not read
_HELLO_SECONDS = 10.0  # for an unknown peer to present the token


@dataclass(eq=False)
class Peer:
    """One connection.

    Attributes:
        hello: its first message, once it has presented the token.
        heard: when it was last heard (monotonic seconds).
        patience: seconds without a sign of life after which it counts as silent.
    """

    connection: socket.socket
    heard: float
    patience: float
    hello: dict[str, Any] | None = None
    received: bytes = b""
    unsent: bytes = b""
    silent: bool = False
    open: bool = True


@dataclass(frozen=True)
class Event:
    """A peer's message, or that it is gone (its connection is closed) or silent."""

    peer: Peer
    kind: Literal["said", "gone", "silent"]
    message: dict[str, Any] = field(default_factory=dict)


class Exchange:
    """The server of the lifelines.

    Args:
        token: what a peer must present first; other peers are disconnected.
        port: to listen on; 0 picks a free one.
        ping: seconds between signs of life.
        silence: seconds after which a peer is to consider the supervisor gone.
        patience: initial `Peer.patience` of new peers.

    Raises:
        MegagrowError: the port is in use.
    """

    def __init__(
        self,
        *,
        token: str,
        port: int = 0,
        ping: float = 2.0,
        silence: float = 30.0,
        patience: float = 30.0,
    ) -> None:
        self._token, self._ping, self._silence, self._patience = token, ping, silence, patience
        self._listener = _listen(port)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.peers: list[Peer] = []
        self._polled = self._pinged = time.monotonic()

    def poll(self, seconds: float) -> list[Event]:
        """Return what has happened; waits for an event for at most this many seconds."""
        events: list[Event] = []
        for key, ready in self._selector.select(min(seconds, self._ping / 2)):
            if key.data is None:
                self._accept()
                continue
            if ready & selectors.EVENT_READ:
                events += self._read(key.data)
            if ready & selectors.EVENT_WRITE and key.data.open:
                events += self._write(key.data)
        return events + self._keep_time()

    def tell(self, peer: Peer, event: str, **fields: Any) -> None:
        """Queue one message for a peer."""
        # The queue of a peer that does not read is bounded; it will soon count as silent.
        if peer.open and len(peer.unsent) < _LINE:
            peer.unsent += json.dumps({"event": event} | fields).encode() + b"\n"
            self._write(peer)

    def tell_all(self, event: str, **fields: Any) -> None:
        """Queue one message for every peer that has presented the token."""
        for peer in self.peers:
            if peer.hello is not None:
                self.tell(peer, event, **fields)

    def close(self) -> None:
        """Disconnect all peers."""
        for peer in list(self.peers):
            self._drop(peer)
        self._selector.close()
        self._listener.close()

    # --- one peer -------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer = Peer(connection, heard=time.monotonic(), patience=self._patience)
                self.peers.append(peer)
                self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: Peer) -> list[Event]:
        try:
            fresh = peer.connection.recv(_LINE)
        except BlockingIOError:
            return []
        except OSError:
            fresh = b""
        if not fresh:
            return self._gone(peer)
        peer.heard, peer.silent = time.monotonic(), False
        *lines, peer.received = (peer.received + fresh).split(b"\n")
        events: list[Event] = []
        try:
            if len(peer.received) > _LINE:
                raise ValueError("an endless line")
            for line in filter(None, lines):
                message = json.loads(line)
                self._introduce(peer, message)
                events.append(Event(peer, "said", message))
        except (ValueError, RecursionError):  # an unknown peer, or garbage
            events += self._gone(peer)
        return events

    def _introduce(self, peer: Peer, message: Any) -> None:
        """Raise ValueError unless the peer has presented the token, now or before."""
        if not isinstance(message, dict):
            raise ValueError("a message is an object")
        if peer.hello is None:
            shown = str(message.pop("token", "")).encode(errors="replace")
            if not hmac.compare_digest(shown, self._token.encode()):
                raise ValueError("not the token")
            peer.hello = message
            self.tell(peer, "welcome", ping=self._ping, silence=self._silence)

    def _write(self, peer: Peer) -> list[Event]:
        try:
            while peer.unsent:
                peer.unsent = peer.unsent[peer.connection.send(peer.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            peer.unsent = b""  # reading will show that it is gone
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
        self._selector.modify(peer.connection, wanted, peer)
        return []

    def _gone(self, peer: Peer) -> list[Event]:
        self._drop(peer)
        return [Event(peer, "gone")] if peer.hello is not None else []

    def _drop(self, peer: Peer) -> None:
        if peer.open:
            peer.open = False
            self._selector.unregister(peer.connection)
            peer.connection.close()
            self.peers.remove(peer)

    # --- time -----------------------------------------------------------------------------

    def _keep_time(self) -> list[Event]:
        """Send pings; drop peers that never present a token or have gone silent."""
        now = time.monotonic()
        # If this process itself stood still, it heard nobody; that is not the peers' fault.
        away = now - self._polled > max(5.0, 2 * self._ping)
        self._polled = now
        events: list[Event] = []
        for peer in list(self.peers):
            if away:
                peer.heard = now
            elif peer.hello is None and now - peer.heard > _HELLO_SECONDS:
                self._drop(peer)
            elif now - peer.heard > peer.patience and not peer.silent:
                peer.silent = True
                events.append(Event(peer, "silent", {"seconds": now - peer.heard}))
        if now - self._pinged >= self._ping:
            self._pinged = now
            for peer in self.peers:
                if peer.hello is not None and not peer.unsent:
                    peer.unsent = b"\n"
                    self._write(peer)
        return events


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
            )
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise MegagrowError(
            f"port {port} of {socket.gethostname()}, for the lifelines of the ranks",
            found=error.strerror or error,
            expected="a port that is free",
            fix="choose another one by --port, or leave it out",
        ) from error
