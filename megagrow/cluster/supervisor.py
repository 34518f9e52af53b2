"""Decides for a whole job: when an attempt is over, whether another follows, how it all ended.

The exit status is the truth about the job: 0 if every rank reported that it is done, 75 if all
were stopped by a signal and have saved, 78 if restarting would not help, else 1.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.cluster import ranklog
from megagrow.cluster.hub import Event, Hub, Peer
from megagrow.cluster.lifeline import STATUS_STOPPED
from megagrow.cluster.roster import STATUS_CONFIG, STATUS_FAILED, Failure, Roll

LOG = "supervisor.jsonl"  # in the directory of logs: when each attempt began, failed and ended
_POLL_SECONDS = 0.1
_LAUNCHER_SECONDS = 20.0  # time for a launcher to end after its last rank
_CLEAR_SECONDS = 45.0  # time for the nodes to end what is left
_FINISH_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds, and the number of restarts.

    Attributes:
        start: from the start until every rank has reported.
        silence: without a sign of life from a training rank or a node; one that does not hear the
            supervisor for this long ends itself.
        grace: from the first failure until the other ranks are ended, so that they can report;
            none after a silence.
        stop: from a signal until all ranks have saved.
        restarts: maximum number without a newer checkpoint in between.
        backoff: before the first restart; doubled for each further one.
        longest: maximum backoff.
    """

    start: float = 600.0
    silence: float = 30.0
    grace: float = 10.0
    stop: float = 600.0
    restarts: int = 3
    backoff: float = 5.0
    longest: float = 300.0


class Supervisor:
    """Runs a job to its end by orders to its nodes; `run` is for a thread of its own.

    Args:
        hub: the lifelines.
        limits: time limits and number of restarts.
        nodes: the least number that an attempt needs, for messages.
        logs: a directory; each attempt gets a subdirectory.
    """

    def __init__(self, hub: Hub, limits: Limits, *, nodes: int = 1, logs: Path | None = None):
        self._hub, self._limits, self._least, self._logs = hub, limits, nodes, logs
        self._nodes: dict[Peer, str] = {}  # all that are connected, with their hosts
        self._members: set[Peer] = set()  # that take part in the attempt
        self._cleared: set[Peer] = set()
        self._order: dict[str, Any] = {}
        self._signal = 0
        self._more = False  # a node waits to take part
        self._cut_off: list[str] = []

    def run(self) -> int:
        """Start and restart until the job is done or cannot continue; returns the exit status."""
        status = STATUS_FAILED
        try:
            status = self._attempts()
        finally:
            for node in list(self._nodes):
                self._hub.tell(node, "finish", status=status)
            end = time.monotonic() + _FINISH_SECONDS
            while self._nodes and time.monotonic() < end:
                self._hear_all(Roll(-1, silence=0))
            self._hub.close()
        return status

    def _attempts(self) -> int:
        number, newest, in_vain, wait, trained = 1, -1, 0, 0.0, False
        while True:
            roll = self._attempt(number, wait)
            status = roll.verdict()
            trained = trained or roll.trained
            if self._signal and status == STATUS_FAILED and not (trained and roll.ranks):
                status = STATUS_STOPPED  # while ranks were starting: nothing is lost
            number += 1
            if status == STATUS_STOPPED and self._more and not self._signal:
                in_vain, wait = 0, 0.0
                newest = max(newest, roll.saved)
                _say("all ranks have saved; starting again with the nodes that came")
                continue
            if status != STATUS_FAILED or self._signal:
                return status
            cause = roll.cause()
            if not trained and cause is not None and cause.kind:
                _say("it failed before it began to train; starting it again would not help")
                return status
            in_vain = 1 if roll.saved > newest else in_vain + 1
            newest = max(newest, roll.saved)
            if in_vain > self._limits.restarts:
                if self._limits.restarts:
                    _say(
                        f"{in_vain} attempts without a newer checkpoint; --restarts allows no more"
                    )
                return status
            wait = min(self._limits.backoff * 2 ** (in_vain - 1), self._limits.longest)
            if self._cut_off:
                # Ranks that could not be reached end themselves after this time.
                wait = max(wait, 1.5 * self._limits.silence)
            _say(
                f"starting again from the last checkpoint in {wait:g} s "
                f"(number {in_vain} of {self._limits.restarts} without a newer one)"
            )

    # --- one attempt ----------------------------------------------------------------------

    def _attempt(self, number: int, wait: float) -> Roll:
        roll = Roll(number, silence=self._limits.silence, reject=self._reject)
        logs = _next_directory(self._logs)
        self._members, self._cleared, self._cut_off, self._more = set(), set(), [], False
        self._order = {"number": number, "wait": wait, "logs": None if logs is None else str(logs)}
        self._note("attempt", number=number, wait=wait)
        for node in list(self._nodes):
            self._hub.tell(node, "attempt", **self._order)
        try:
            self._watch(roll, begin=time.monotonic() + wait)
        finally:
            self._end(roll)
        if roll.verdict() not in (0, STATUS_STOPPED):
            _report(roll, logs)
        return roll

    def _watch(self, roll: Roll, *, begin: float) -> None:
        """Monitor the job until it is over, one way or another."""
        limits = self._limits
        failed = asked = over = None
        number = 0
        while True:
            for event in self._hear_all(roll):
                if asked is not None and event.message.get("event") == "start":
                    self._hub.tell(event.peer, "stop", signal=number)
            now = time.monotonic()
            if asked is None and (self._signal or (self._more and roll.trained)):
                asked, number = now, self._signal or int(signal.SIGUSR1)
                why = signal.Signals(number).name if self._signal else "a further node is there"
                _say(f"{why}: {len(roll.busy())} ranks are told to save and stop")
                for rank in roll.ranks.values():
                    self._hub.tell(rank.peer, "stop", signal=number)
            if self._signal and roll.nodes is None:
                return  # nothing has started yet
            if roll.failures and failed is None:
                failed = now
                self._note("failure", number=roll.number, what=roll.failures[0].where)
            if failed is not None:
                # After a silence the others hang in collectives: there is nothing to wait for.
                grace = 0.0 if roll.failures[0].silent else limits.grace
                if roll.all_ended() or now - failed > grace:
                    return
            if over is None and (roll.all_ended() or roll.launchers_ended()):
                over = now
            if over is not None:
                if roll.all_ended() and (roll.launchers_ended() or now - over > _LAUNCHER_SECONDS):
                    return
                # The ranks' last words may still arrive after their launcher has ended.
                if not roll.all_ended() and now - over > 2.0:
                    over = None
                    roll.fail(_left_alone(roll))
            if asked is not None and now - asked > limits.stop:
                roll.fail(_not_in_time("save after the signal", roll, limits.stop))
                return
            if not roll.all_here() and now - begin > limits.start and failed is None:
                roll.fail(self._not_started(roll))

    def _end(self, roll: Roll) -> None:
        self._note("ending", number=roll.number)
        cause = roll.cause()
        first_line = cause.where.splitlines()[0] if cause is not None else "the job is over"
        ranks = [peer for peer in self._hub.peers if peer not in self._nodes]
        for peer in ranks:
            self._hub.tell(peer, "end", reason=f"the supervisor ends this job: {first_line}")
        for node in self._nodes:
            self._hub.tell(node, "over", number=roll.number)
        begin = time.monotonic()
        while set(self._nodes) - self._cleared and time.monotonic() - begin < _CLEAR_SECONDS:
            self._hear_all(roll)
            if time.monotonic() - begin > 1.0:
                # This ends every rank that got no order.
                for peer in ranks:
                    self._hub.drop(peer)
        for peer in ranks:
            self._hub.drop(peer)
        self._cut_off += [self._nodes[node] for node in set(self._nodes) - self._cleared]
        if self._cut_off:
            _say(
                f"could not end what may be left on {'; '.join(self._cut_off)}: ranks there end "
                f"themselves after {self._limits.silence:g} s without the supervisor"
            )
        self._note("ended", number=roll.number)

    def _note(self, event: str, **fields: Any) -> None:
        """Write a line with its time to the supervisor's log, if there is one."""
        if self._logs is None:
            return
        line = json.dumps({"event": event, **fields, "time": time.time()})
        with contextlib.suppress(OSError), open(self._logs / LOG, "a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")

    # --- what is heard --------------------------------------------------------------------

    def _hear_all(self, roll: Roll) -> list[Event]:
        """Process what has happened; waits a moment for it."""
        events: list[Event] = []
        wait = _POLL_SECONDS
        while True:
            try:
                event = self._hub.events.get(timeout=wait)
            except queue.Empty:
                return events
            wait = 0.0
            events.append(event)
            try:
                if event.peer in self._nodes or event.message.get("event") == "node":
                    self._hear_node(event, roll)
                else:
                    roll.hear(event)
            except (KeyError, TypeError, ValueError) as error:
                _say(f"a peer sent nonsense and is disconnected ({error!r})")
                self._hub.drop(event.peer)

    def _hear_node(self, event: Event, roll: Roll) -> None:
        node, message, said = event.peer, event.message, event.message.get("event")
        if said == "node":
            self._nodes[node] = str(message["host"])
            node.patience = self._limits.silence
            if self._order:
                self._hub.tell(node, "attempt", **self._order)
            return
        host = self._nodes[node]
        if event.kind == "gone":
            del self._nodes[node]
            if node in self._members:
                roll.fail(
                    Failure(f"the supervisor of node {host} is gone", "its host or its task ended")
                )
        elif event.kind == "silent":
            if node in self._members:
                seconds = message["seconds"]
                roll.fail(
                    Failure(f"nothing was heard from node {host} for {seconds:.0f} s",
                            "its host is cut off or down", silent=True)
                )  # fmt: skip
                self._cut_off.append(f"node {host}")
            self._members.discard(node)
            self._hub.drop(node)  # it knows by itself; if it lives, it may join again
        elif said == "signal":
            self._signal = self._signal or int(message["signal"])
        elif message["number"] != roll.number:
            pass  # late news of an attempt that is over
        elif said == "joined":
            self._members.add(node)
            roll.nodes = int(message["nodes"])
        elif said == "exit":
            roll.exit(message["rank"], str(message["how"]))
        elif said == "ended":
            roll.ended[node] = str(message["how"])
        elif said == "waiting":
            self._more = True
        elif said == "failed" and (node in self._members or roll.nodes is None):
            roll.fail(Failure(str(message["text"]), "", kind=str(message["kind"])))
        elif said == "cleared":
            self._cleared.add(node)
            self._cut_off += map(str, message["left"])

    def _reject(self, peer: Peer) -> None:
        self._hub.tell(peer, "end", reason="it belongs to an attempt that is over")

    def _not_started(self, roll: Roll) -> Failure:
        if roll.nodes is not None:
            return _not_in_time("start", roll, self._limits.start)
        return Failure(
            f"the nodes did not meet within {self._limits.start:g} s",
            f"{len(self._nodes)} of at least {self._least} are there "
            f"({_some(sorted(self._nodes.values()))}); all must be started with the same "
            "--nnodes, --master and MEGAGROW_SECRET",
        )


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def _left_alone(roll: Roll) -> Failure:
    left = roll.busy()
    if left:
        found = f"{len(left)} ranks still run, for instance {left[0].name}, {left[0].was}"
    elif roll.ranks:
        found = f"of {roll.world} ranks, {_some(roll.missing())} never started"
    else:
        found = "no rank has started; see the output above"
    return Failure("; ".join(dict.fromkeys(roll.ended.values())), found)


def _not_in_time(what: str, roll: Roll, seconds: float) -> Failure:
    if roll.missing():
        found = f"ranks {_some(roll.missing())} of {roll.world} are not there"
    else:
        found = f"{len(roll.busy())} of {len(roll.ranks)} ranks have not ended: " + ", ".join(
            f"{rank.name}, {rank.was}" for rank in roll.busy()[:4]
        )
    if not roll.ranks:
        found = "no rank is there"
    return Failure(f"the ranks did not {what} within {seconds:g} s", found)


def _some(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:8])) + (" ..." if len(items) > 8 else "")


def _report(roll: Roll, logs: Path | None) -> None:
    """Report why it failed, in the form of megagrow's errors."""
    cause = roll.cause()
    if cause is None:
        return
    lines = [f"error: {cause.where}"]
    found = "; ".join(filter(None, [cause.found, roll.how.get(cause.rank, "")]))
    if found:
        lines.append(f"  found:    {found}")
    others = len(roll.failures) - 1
    if others > 0:
        lines.append(f"            {others} more failures followed from it or came after it")
    if logs is not None:
        lines.append(f"  fix:      see {logs} ({ranklog.name(1)} and so on, console.log)")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _next_directory(logs: Path | None) -> Path | None:
    """A new directory in `logs`; None if it cannot be created, which is no reason to stop."""
    if logs is None:
        return None
    try:
        logs.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name[8:]) for p in logs.glob("attempt_*") if p.name[8:].isdecimal()]
        path = logs.resolve() / f"attempt_{max(taken, default=0) + 1:04}"
        path.mkdir()
    except OSError as error:
        _say(f"no logs: {logs}: {error.strerror}")
        return None
    return path


__all__ = ["STATUS_CONFIG", "STATUS_FAILED", "STATUS_STOPPED", "Limits", "Supervisor"]
