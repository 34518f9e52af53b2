"""A node of a job, on PyTorch's elastic agent: meets the other nodes, starts and ends its ranks.

What `torchrun` is made of does the work: the rendezvous of nodes that may come and go, the
assignment of ranks, the start of processes with their environment and error files.  Ours is what
it lacks: the state of the rendezvous travels over the lifeline, where only members of the job can
write (it is a pickle); PyTorch's store for the ranks listens on the interface of the job alone;
and one supervisor decides for all nodes when an attempt is over and whether another follows.

To the supervisor a node says ``node`` (host), and of an attempt (number) ``joined`` (nodes),
``exit`` (rank, how), ``ended`` (how), ``waiting``, ``failed`` (text, kind), ``cleared`` (left) and
``signal``.  The supervisor's orders are ``attempt`` (number, wait, logs), ``over`` (number) and
``finish`` (status).  No order names a command: what is run stands on this node's command line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed.elastic.multiprocessing.api as processes
import torch.distributed.elastic.rendezvous.dynamic_rendezvous as rendezvous
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from megagrow.cluster.hosts import Fleet, Order, Workers
from megagrow.cluster.hub import raise_descriptor_limit
from megagrow.cluster.lifeline import ATTEMPT, VARIABLE, Lifeline, connect
from megagrow.cluster.ranklog import VARIABLE as LOGS
from megagrow.cluster.ranklog import Console
from megagrow.cluster.rendezvous import OverError, rendezvous_of
from megagrow.cluster.roster import STATUS_FAILED
from megagrow.cluster.signals import taking
from megagrow.errors import MegagrowError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 2.0  # between looks for further nodes
_END_SECONDS = 5  # for a killed process to be gone


# Their warnings tell what the supervisor decides and says: processes killed, attempts ended.
for _module in (processes, rendezvous):
    _module.logger.setLevel(logging.ERROR)
# Its own signal handlers would end the ranks without a save.
os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""


class Node:
    """This process's part of a job.

    Args:
        address: host and port of the supervisor.
        secret: of the job.
        fleet: what to start here.
        here: this host's address, as the other nodes reach it.
        join: seconds to wait for the supervisor and for the other nodes.

    Raises:
        MegagrowError: the supervisor cannot be reached.
    """

    def __init__(
        self, address: tuple[str, int], secret: bytes, fleet: Fleet, *, here: str, join: float
    ) -> None:
        raise_descriptor_limit()  # for PyTorch's store, to which all ranks connect
        self.fleet, self.here, self.join = fleet, here, join
        self.address = f"{address[0]}:{address[1]}"
        self._orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._over, self._finished = 0, False
        self._signals: list[int] = []
        self._interrupted = False
        self.line: Lifeline = connect(
            *address, secret=secret, seconds=join, who="the supervisor of this node",
            hello={"event": "node", "host": socket.gethostname()}, on_other=self._hear,
            on_lost=lambda reason: self._hear({"event": "lost", "reason": reason}),
        )  # fmt: skip

    def run(self) -> int:
        """Follow orders until the job is over; returns its exit status."""
        with taking(SIGNALS, self._heard):
            try:
                while True:
                    self.pass_on_signals()
                    with contextlib.suppress(queue.Empty):
                        order = self._orders.get(timeout=_POLL_SECONDS)
                        status = self._obey(order)
                        if status is not None:
                            return status
            finally:
                self.fleet.clear()
                self.line.close()

    def over(self, number: int) -> bool:
        """Whether an attempt is over; passes on signals meanwhile."""
        self.pass_on_signals()
        return self._finished or self._over >= number

    def pass_on_signals(self) -> None:
        """Tell the supervisor of signals: a handler must not touch the lifeline."""
        while self._signals:
            self.line.say("signal", signal=self._signals.pop())

    # --- orders ---------------------------------------------------------------------------

    def _hear(self, order: dict[str, Any]) -> None:
        """Called in the lifeline's thread."""
        if order["event"] == "over":
            self._over = int(order["number"])
            return
        self._finished = self._finished or order["event"] in ("finish", "lost")
        self._orders.put(order)

    def _obey(self, order: dict[str, Any]) -> int | None:
        if order["event"] == "attempt":
            number, logs = int(order["number"]), order["logs"]
            end = time.monotonic() + float(order["wait"])
            while time.monotonic() < end and not self.over(number):
                time.sleep(_POLL_SECONDS)
            self._attempt(Order(number, None if logs is None else Path(logs)))
        elif order["event"] == "finish":
            return int(order["status"])
        elif order["event"] == "lost":
            print(
                f"supervise: {socket.gethostname()}: the supervisor at {self.address}: "
                f"{order['reason']}; the ranks of this node are ended",
                file=sys.stderr,
                flush=True,
            )
            return STATUS_FAILED
        return None

    def _attempt(self, order: Order) -> None:
        """Take part in an attempt until it is over."""
        try:
            if self.over(order.number):
                raise OverError
            workers = self.fleet.prepare(order)
            environ = {VARIABLE: self.address, ATTEMPT: str(order.number)}
            if order.logs is not None:
                environ[LOGS] = str(order.logs)
            with Console(order.logs) as console:
                Agent(self, order, workers, environ | workers.environ, console).run()
        except OverError:
            pass
        except Exception as error:
            kind = type(error).__name__ if isinstance(error, MegagrowError) else ""
            text = str(error) if kind else f"{type(error).__name__}: {error}"
            where = "" if kind else f"node {socket.gethostname()}: "
            self.line.say(
                "failed", number=order.number, text=where + text,
                kind=kind if kind == "ConfigError" else "",
            )  # fmt: skip
            while not self.over(order.number):
                time.sleep(_POLL_SECONDS)
        finally:
            left = self.fleet.clear()
        self.line.say("cleared", number=order.number, left=left)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt  # asked twice by hand: end at once, without saving
        self._interrupted = self._interrupted or number == signal.SIGINT
        # Python's own SIGINT would print a traceback in each rank; they handle SIGTERM.
        self._signals.append(int(signal.SIGTERM if number == signal.SIGINT else number))


class Agent(LocalElasticAgent):
    """One attempt of a node."""

    def __init__(
        self,
        node: Node,
        order: Order,
        workers: Workers,
        environ: dict[str, str],
        console: Console,
    ) -> None:
        self._node, self._order, self._console = node, order, console
        self._environ = environ
        self._rendezvous_handler = rendezvous_of(node, order)
        self._launcher = workers.launcher
        spec = WorkerSpec(
            role="rank",
            local_world_size=workers.count,
            rdzv_handler=self._rendezvous_handler,
            entrypoint=workers.words[0],
            args=tuple(word.replace("$", "$$") for word in workers.words[1:]),  # a template
            max_restarts=order.number - 1,  # which tells the ranks how often they were restarted
        )
        super().__init__(spec, _Logs(order.logs, console))
        self._remaining_restarts = 0

    def _invoke_run(self, role: str = "") -> RunResult:
        """Start the ranks, and watch them until the supervisor ends the attempt."""
        group, number, line = self._worker_group, self._order.number, self._node.line
        self._initialize_workers(group)
        self._console.started(first=group.group_rank == 0)
        running = {worker.local_rank: worker.global_rank for worker in group.workers}
        hows: dict[int, str] = {}
        look = time.monotonic()
        while not self._node.over(number):
            time.sleep(_POLL_SECONDS)
            for local, rank in list(running.items()):
                how = self._how(local)
                if how is not None:
                    del running[local]
                    hows[rank] = how
                    if not self._launcher:
                        line.say("exit", number=number, rank=rank, how=how)
                    if not running:
                        line.say("ended", number=number, how=self._all(hows))
            if group.group_rank == 0 and time.monotonic() - look > _LOOK_SECONDS:
                look = time.monotonic()
                if self._rendezvous_handler.num_nodes_waiting() > 0:
                    line.say("waiting", number=number)
        good = not running and not any(hows.values())
        state = WorkerState.SUCCEEDED if good else WorkerState.FAILED
        return RunResult(state, return_values=dict.fromkeys(hows) if good else {})

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Called after the rendezvous."""
        nodes = worker_group.group_world_size
        self._node.line.say("joined", number=self._order.number, nodes=nodes)
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 0) -> None:
        """Kill the ranks: they were told, and had their time, or nobody is left to wait for."""
        super()._shutdown(signal.SIGKILL, _END_SECONDS)
        self._rendezvous_handler.shutdown()

    def _set_local_rank_env(self, worker_env: Any, local_rank: int, spec: WorkerSpec) -> None:
        super()._set_local_rank_env(worker_env, local_rank, spec)
        worker_env.update(self._environ)

    def _how(self, local: int) -> str | None:
        """How a process ended, in words; "" for status 0, None while it runs."""
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        status = handlers[local].proc.poll()
        if status is None or status == 0:
            return None if status is None else ""
        ended = f"exit status {status}"
        if status < 0:
            ended = f"killed by {signal.Signals(-status).name}"
        return f"{ended}{_error_in(self._pcontext.error_files[local])}"  # type: ignore[union-attr]

    def _all(self, hows: dict[int, str]) -> str:
        bad = next(filter(None, hows.values()), "exit status 0")
        what = "the launcher" if self._launcher else "the processes of the nodes"
        return f"{what} ended: {bad}"


def _error_in(path: str) -> str:
    """The message in a rank's error file, if it wrote one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        message = json.loads(Path(path).read_text(encoding="utf-8"))["message"]
        text = message["message"] if isinstance(message, dict) else message
        return f": {str(text).splitlines()[-1]}"
    return ""


class _Logs(LogsSpecs):
    """All output goes to the console, from which ranks other than 0 divert their own."""

    def __init__(self, logs: Path | None, console: Console) -> None:
        super().__init__()
        self._logs, self._console = logs, console

    @property
    def root_log_dir(self) -> str:
        return str(self._logs or os.devnull)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        streams = dict.fromkeys(envs, self._console.path)
        errors = {}
        for local, environ in envs.items():
            path = os.devnull
            if self._logs is not None and self._logs.is_dir():
                path = str(self._logs / f"rank_{int(environ['RANK']):05}.error.json")
                environ["TORCHELASTIC_ERROR_FILE"] = path
            errors[local] = path
        return LogsDest(dict(streams), dict(streams), {}, {}, errors, os.devnull, os.devnull)
