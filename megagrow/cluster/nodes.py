"""A job whose scheduler starts every node: one supervisor per node, no ssh.

Node 0's supervisor decides; those on the other nodes are its agents.  They connect to it on one
port, and start torchrun and end what is left on its orders.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megagrow.cluster import launchers, network
from megagrow.cluster.hosts import Attempt
from megagrow.cluster.lifeline import Lifeline, connect
from megagrow.cluster.lifeline_server import Event, Exchange, Peer
from megagrow.cluster.process import Launcher
from megagrow.cluster.roster import STATUS_FAILED, Failure
from megagrow.cluster.signals import taking
from megagrow.cluster.supervisor import SIGNALS
from megagrow.errors import MegagrowError

_CLEAR_SECONDS = 20.0
_FINISH_SECONDS = 5.0


@dataclass(frozen=True)
class NodeJob:
    """What every node knows from the start.

    Attributes:
        nodes: number of nodes.
        node: index of this one, from 0.
        master: node 0's name or address, as all nodes reach it.
        port: of its supervisor.
        token: the same on all nodes; keeps jobs apart.
        ranks: on each node; None for one per device.
        join: seconds within which all nodes must have joined.
        silence: seconds without a sign of life after which a node counts as lost.
    """

    nodes: int
    node: int
    master: str
    port: int
    token: str
    ranks: int | None
    environ: Mapping[str, str]
    join: float = 600.0
    silence: float = 30.0

    def launch(self, order: Mapping[str, Any], *, log: Any = None) -> Launcher:
        """Start torchrun here, as node 0's order says."""
        command = launchers.on_node(
            order["script"],
            nodes=self.nodes,
            node=self.node,
            ranks=self.ranks,
            master=order["master"],
            port=order["port"],
            environ={**self.environ, **order["environ"]},
        )
        return Launcher(command, mark=order["mark"], log=log)


class Nodes:
    """The fleet of node 0: itself and its agents.

    Raises:
        MegagrowError: the port is in use.
    """

    def __init__(self, job: NodeJob) -> None:
        self._job = job
        self._exchange = Exchange(
            token=job.token, port=job.port, silence=job.silence, patience=job.silence
        )
        self._agents: dict[int, Peer] = {}
        self._launcher: Launcher | None = None
        self._attempt: Attempt | None = None
        self._waiting_since: float | None = None
        self._statuses: dict[int, int] = {}
        self._signals: list[int] = []
        self._mark = ""

    def start(self, attempt: Attempt) -> None:
        """Start as soon as all nodes have joined; done by `poll`."""
        self._attempt, self._waiting_since = attempt, time.monotonic()
        self._statuses = {}

    def poll(self) -> list[Failure]:
        """Process the agents' messages."""
        failures = []
        for event in self._exchange.poll(0.0):
            failures += self._hear(event)
        if self._waiting_since is not None:
            if not self._missing():
                self._launch()
            elif time.monotonic() - self._waiting_since > self._job.join:
                self._waiting_since = None
                failures.append(
                    Failure(
                        f"nodes {', '.join(map(str, self._missing()))} of {self._job.nodes} did "
                        f"not join within {self._job.join:g} s",
                        f"this one listens at {self._job.master}:{self._job.port}; they must be "
                        "started with the same --nnodes, --master and MEGAGROW_TOKEN",
                    )
                )
        if self._launcher is not None and self._launcher.status() is not None:
            self._statuses.setdefault(0, self._launcher.status() or 0)
        return failures

    def signals(self) -> list[int]:
        """Signals received by the agents."""
        heard, self._signals = self._signals, []
        return heard

    def ended(self) -> str | None:
        """How torchrun ended on the nodes, once it has on all."""
        if len(self._statuses) < self._job.nodes:
            return None
        return f"torchrun ended on all nodes with status {max(self._statuses.values(), key=abs)}"

    def end(self) -> list[str]:
        """End what is left on all nodes."""
        self._waiting_since = None
        waiting = set()
        if self._mark:
            for node, peer in self._agents.items():
                self._exchange.tell(peer, "clear", mark=self._mark)
                waiting.add(node)
        left = []
        if self._launcher is not None:
            left = [f"process {pid} of this host" for pid in self._launcher.end()]
        end = time.monotonic() + _CLEAR_SECONDS
        while waiting and time.monotonic() < end:
            for event in self._exchange.poll(0.1):
                self._hear(event)
                if event.message.get("event") == "cleared":
                    waiting.discard(self._node_of(event.peer))
            waiting &= set(self._agents)
        self._launcher, self._mark = None, ""
        missing = waiting | set(self._missing())
        return left + [f"node {node}" for node in sorted(missing)]

    def finish(self, status: int) -> None:
        """Send the job's exit status to the agents, which exit with it."""
        self._exchange.tell_all("finish", status=status)
        end = time.monotonic() + _FINISH_SECONDS
        while self._agents and time.monotonic() < end:
            for event in self._exchange.poll(0.1):
                self._hear(event)
        self._exchange.close()

    # --- parts ----------------------------------------------------------------------------

    def _missing(self) -> list[int]:
        return [node for node in range(1, self._job.nodes) if node not in self._agents]

    def _node_of(self, peer: Peer) -> int:
        return next((node for node, agent in self._agents.items() if agent is peer), -1)

    def _launch(self) -> None:
        assert self._attempt is not None
        self._waiting_since, self._mark = None, secrets.token_hex(8)
        # As the others reached it: its own name may resolve to loopback here.
        seen = [peer.connection.getsockname()[0] for peer in self._agents.values()]
        master = seen[0].removeprefix("::ffff:") if seen else self._job.master
        order = {
            "master": master,
            "script": list(self._attempt.script),
            "port": network.free_port(),
            "environ": self._attempt.environ(master),
            "mark": self._mark,
        }
        for peer in self._agents.values():
            self._exchange.tell(peer, "launch", **order)
        logs = self._attempt.logs
        self._launcher = self._job.launch(order, log=logs and logs / "console.log")

    def _hear(self, event: Event) -> list[Failure]:
        message = event.message
        if event.kind == "said" and message.get("event") == "node":
            return self._join(event.peer, message)
        node = self._node_of(event.peer)
        if node < 0:
            return []
        name = f"node {node} ({(event.peer.hello or {}).get('host')})"
        if event.kind == "gone":
            del self._agents[node]
            return [Failure(f"the supervisor of {name} is gone", "its host or its task ended")]
        if event.kind == "silent":
            return [Failure(f"nothing was heard from {name} for {message['seconds']:.0f} s",
                            "its host is cut off or down")]  # fmt: skip
        if message.get("event") == "ended":
            self._statuses[node] = int(message["status"])
        elif message.get("event") == "signal":
            self._signals.append(int(message["signal"]))
        return []

    def _join(self, peer: Peer, message: dict[str, Any]) -> list[Failure]:
        node = int(message["node"])
        if not 0 < node < self._job.nodes or message["nodes"] != self._job.nodes:
            self._exchange.tell(peer, "finish", status=STATUS_FAILED)
            return [
                Failure(
                    f"{message['host']} joined as node {node} of {message['nodes']}",
                    f"this job has {self._job.nodes} nodes, counted from 0",
                )
            ]
        if node in self._agents:
            self._exchange.tell(peer, "finish", status=STATUS_FAILED)
            return [Failure(f"node {node} is there twice", f"the second is {message['host']}")]
        self._agents[node] = peer
        return []


class Agent:
    """The supervisor of a node other than 0.

    Raises:
        MegagrowError: node 0 cannot be reached.
    """

    def __init__(self, job: NodeJob) -> None:
        self._job = job
        self._orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        try:
            connection = connect(job.master, job.port, seconds=job.join)
        except OSError as error:
            raise MegagrowError(
                f"node {job.node} on {socket.gethostname()}: the supervisor of node 0 cannot be "
                "reached",
                found=f"{job.master}:{job.port}: {error.strerror or error}",
                expected="launch/supervise.py on node 0, with the same --master",
                fix="see whether node 0 runs and lets this host reach that port",
            ) from error
        hello = {"token": job.token, "event": "node", "node": job.node, "nodes": job.nodes,
                 "host": socket.gethostname()}  # fmt: skip
        self._line = Lifeline(
            connection,
            hello,
            on_lost=lambda reason: self._orders.put({"event": "lost", "reason": reason}),
            on_other=self._orders.put,
        )
        self._launcher: Launcher | None = None
        self._reported = True

    def run(self) -> int:
        """Follow orders until the job is over; returns its exit status."""
        with taking(SIGNALS, self._heard):
            try:
                while True:
                    status = self._obey(self._next_order())
                    if status is not None:
                        return status
            finally:
                self._clear()
                self._line.close()

    def _next_order(self) -> dict[str, Any]:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._orders.get(timeout=0.2)
            status = self._launcher.status() if self._launcher is not None else None
            if status is not None and not self._reported:
                self._reported = True
                self._line.say("ended", status=status)

    def _obey(self, order: dict[str, Any]) -> int | None:
        event = order["event"]
        if event == "launch":
            self._clear()
            self._launcher, self._reported = self._job.launch(order), False
        elif event == "clear":
            left = self._clear()
            if not left:
                self._line.say("cleared")
        elif event == "signalled":  # a signal handler must not touch the lifeline's locks
            self._line.say("signal", signal=order["signal"])
        elif event == "finish":
            return int(order["status"])
        elif event == "lost":
            print(
                f"supervise: node {self._job.node}: node 0 ({self._job.master}): "
                f"{order['reason']}; the ranks of this node are ended",
                file=sys.stderr,
                flush=True,
            )
            return STATUS_FAILED
        return None

    def _clear(self) -> list[int]:
        launcher, self._launcher = self._launcher, None
        return launcher.end() if launcher is not None else []

    def _heard(self, number: int, _: FrameType | None) -> None:
        name = signal.SIGTERM if number == signal.SIGINT else signal.Signals(number)
        self._orders.put({"event": "signalled", "signal": int(name)})


def master_of(text: str) -> tuple[str, int]:
    """Parse ``host:port``.

    Raises:
        MegagrowError: it does not have that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise MegagrowError(
            "--master", found=text, expected="HOST:PORT of node 0, for instance node1:29400"
        )
    return host.strip("[]"), int(port)
