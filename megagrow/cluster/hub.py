"""The supervisor's end of all lifelines, and the store by which the nodes of a job meet.

PyTorch's own store (TCPStore) has no authentication, and the state of a rendezvous in it is a
pickle: whoever reaches its port could run code on every node.  It neither drops strangers nor
tells when a client is gone, and a client whose cable is cut waits for the system's timeout.
Hence this one: strangers are disconnected, and both ends know within seconds that the other is
gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import resource
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from megagrow import background
from megagrow.cluster import wire
from megagrow.errors import MegagrowError

_HELLO_SECONDS = 10.0  # for a stranger to prove that it knows the secret
_MOST_STRANGERS = 4096
_BACKLOG = 4096
_BUFFER = 1 << 14  # bytes read ahead from a connection
_AGAIN_SECONDS = 0.2
_UNSENT = 1 << 20  # bytes queued for a peer that does not read


@dataclass(eq=False)
class Peer:
    """A connection that has proved to belong to the job.

    Attributes:
        heard: when it was last heard (monotonic seconds).
        patience: seconds without a sign of life after which it counts as silent.
    """

    writer: asyncio.StreamWriter
    seal: wire.Seal
    heard: float
    patience: float
    silent: bool = False


@dataclass(frozen=True)
class Event:
    """A peer's message, or that it is gone (its connection is closed) or silent."""

    peer: Peer
    kind: Literal["said", "gone", "silent"]
    message: dict[str, Any] = field(default_factory=dict)


class Hub:
    """The server, in a thread of its own.

    Args:
        secret: what peers must know.
        address: of the interface to listen on.
        port: 0 picks a free one.
        ping: seconds between signs of life.
        silence: seconds after which a peer is to consider the supervisor gone.
        patience: initial `Peer.patience`.

    Attributes:
        events: what has happened.
        port: that it listens on.

    Raises:
        MegagrowError: the address or the port cannot be had.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        address: str,
        port: int = 0,
        ping: float = 2.0,
        silence: float = 30.0,
        patience: float = 30.0,
    ) -> None:
        raise_descriptor_limit()
        self._secret, self._ping, self._silence, self._patience = secret, ping, silence, patience
        self._listener = listen(address, port)
        self._listener.setblocking(False)
        self.address, self.port = address, int(self._listener.getsockname()[1])
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.peers: set[Peer] = set()
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_strangers = min(_MOST_STRANGERS, soft // 4)
        self._values: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._report)
        self._thread = background.Loop("hub", self._run, every=0.0)
        self._closing = asyncio.Event()
        self._thread.start()

    def tell(self, peer: Peer, event: str, **fields: Any) -> None:
        """Queue a message for a peer; does nothing if it is gone."""
        self._call(self._send, peer, {"event": event} | fields)

    def tell_all(self, event: str, **fields: Any) -> None:
        """Queue a message for every peer."""
        for peer in list(self.peers):
            self.tell(peer, event, **fields)

    def drop(self, peer: Peer) -> None:
        """Disconnect a peer."""
        self._call(peer.writer.close)

    def close(self) -> None:
        """Disconnect all, and end."""
        self._call(self._closing.set)
        self._thread.join(5.0)

    def _call(self, what: Any, *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, *arguments)

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> bool:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._listener.close()
            self._loop.close()
        return True

    async def _serve(self) -> None:
        tasks = {asyncio.ensure_future(self._keep_time()), asyncio.ensure_future(self._accept())}
        await self._closing.wait()
        for writer in [peer.writer for peer in self.peers] + list(self._strangers):
            writer.close()
        tasks |= self._tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
                reader, writer = await asyncio.open_connection(sock=connection, limit=_BUFFER)
            except OSError as error:
                if not isinstance(error, ConnectionError):  # as without any descriptor left
                    self._thread.faults.note(error, doing="accepting a connection")
                    self._hang_up_on_strangers(self._most_strangers // 2)
                    await asyncio.sleep(_AGAIN_SECONDS)
                continue
            self._strangers[writer] = None
            self._hang_up_on_strangers(self._most_strangers)
            task = asyncio.ensure_future(self._connected(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0)  # the others' turn

    def _hang_up_on_strangers(self, most: int) -> None:
        """Disconnect the oldest strangers, down to that number."""
        for writer in list(self._strangers)[: max(0, len(self._strangers) - most)]:
            del self._strangers[writer]
            writer.transport.abort()

    def _report(self, _: Any, context: dict[str, Any]) -> None:
        """Called by asyncio for errors that nobody handles."""
        error = context.get("exception") or RuntimeError(context["message"])
        if not isinstance(error, ConnectionError):
            self._thread.faults.note(error)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer: Peer | None = None
        try:
            greeted = await asyncio.wait_for(self._greet(reader, writer), _HELLO_SECONDS)
            if greeted is None or self._strangers.pop(writer, writer) is writer:
                return  # a stranger, or hung up on meanwhile
            splitter, seal = greeted
            peer = Peer(writer, seal, heard=time.monotonic(), patience=self._patience)
            self.peers.add(peer)
            self._send(peer, {"event": "welcome", "ping": self._ping, "silence": self._silence})
            while fresh := await reader.read(65536):
                peer.heard, peer.silent = time.monotonic(), False
                for message in splitter.feed(fresh):
                    if message is not None:
                        self._take(peer, message)
        except (OSError, ValueError, EOFError, RecursionError, asyncio.TimeoutError):
            pass  # it is gone, or was a stranger
        finally:
            self._strangers.pop(writer, None)
            writer.close()
            if peer is not None:
                self.peers.discard(peer)
                self.events.put(Event(peer, "gone"))

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[wire.Splitter, wire.Seal] | None:
        """Exchange proofs; returns None to a stranger."""
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine = os.urandom(wire.NONCE)
        writer.write(mine)
        shown = await reader.readexactly(wire.NONCE + wire.PROOF)
        nonces = mine + shown[: wire.NONCE]
        if not wire.proves(shown[wire.NONCE :], self._secret, "peer", nonces):
            writer.write(os.urandom(wire.PROOF))  # so that a peer knows: its secret is another
            await writer.drain()
            return None
        writer.write(wire.proof(self._secret, "supervisor", nonces))
        incoming = wire.Seal(self._secret, "peer", nonces)
        return wire.Splitter(incoming), wire.Seal(self._secret, "supervisor", nonces)

    def _send(self, peer: Peer, message: dict[str, Any] | None) -> None:
        # What is queued for a peer that does not read is bounded; it will soon count as silent.
        if peer in self.peers and peer.writer.transport.get_write_buffer_size() < _UNSENT:
            peer.writer.write(peer.seal.wrap(message))

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        if "ask" in message:
            answer = self._answer(message)
            self._send(peer, {"event": "answer", "number": message.get("number")} | answer)
        else:
            self.events.put(Event(peer, "said", message))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The store: values are text, and None is the value of a key that was never set."""
        if message["ask"] == "set":
            self._values.update({str(k): str(v) for k, v in dict(message["values"]).items()})
            return {}
        if message["ask"] == "get":
            return {"values": [self._values.get(str(key)) for key in message["keys"]]}
        if message["ask"] == "swap":
            key = str(message["key"])
            swapped = self._values.get(key) == message["expected"]
            if swapped:
                self._values[key] = str(message["value"])
            return {"value": self._values.get(key), "swapped": swapped}
        raise ValueError("not a question")

    async def _keep_time(self) -> None:
        """Send signs of life; report peers that have gone silent."""
        turned = time.monotonic()
        while True:
            await asyncio.sleep(self._ping / 2)
            now = time.monotonic()
            # If this process itself stood still, it heard nobody; that is not the peers' fault.
            away, turned = now - turned > max(5.0, 2 * self._ping), now
            for peer in list(self.peers):
                if away:
                    peer.heard = now
                elif now - peer.heard > peer.patience and not peer.silent:
                    peer.silent = True
                    self.events.put(Event(peer, "silent", {"seconds": now - peer.heard}))
                self._send(peer, None)


def listen(address: str, port: int) -> socket.socket:
    """Listen on one of this host's addresses.

    Raises:
        MegagrowError: the port is in use, or the address is not this host's.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise MegagrowError(
            f"port {port} at {address} of {socket.gethostname()}, for the lifelines of the ranks",
            found=error.strerror or error,
            expected="a port that is free, at an address of this host",
            fix="choose another port by --port (or --master), or an address by --address",
        ) from error


def raise_descriptor_limit() -> int:
    """Allow this process as many open files as the system lets it; returns their number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
