"""The state of an attempt: which nodes and ranks have started, what they do, how they ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megagrow.cluster.hub import Event, Peer
from megagrow.cluster.lifeline import LAST_WORDS, STATUS_STOPPED, USAGE

STATUS_FAILED = 1
STATUS_CONFIG = 78  # sysexits.h: restarting would not help
_HOPELESS = frozenset({"ConfigError", "DataError"})  # of megagrow.errors
_USAGE_STATUS = "exit status 2"  # Python's for a script that is not there, argparse's for an option


@dataclass(eq=False)
class Rank:
    """One rank, as far as it has reported."""

    number: int
    host: str
    pid: int
    peer: Peer
    step: int | None = None
    first_step: int | None = None
    doing: str = ""
    last_word: str | None = None
    here: bool = True

    @property
    def name(self) -> str:
        """The rank and its host, in words."""
        return f"rank {self.number} on {self.host} (pid {self.pid})"

    @property
    def was(self) -> str:
        """What it last did, in words."""
        at = [self.doing] if self.doing else []
        if self.step is not None and "step" not in self.doing:
            at.append(f"step {self.step}")
        return ", ".join(at) or "starting"


@dataclass(frozen=True)
class Failure:
    """Why an attempt cannot succeed.

    Attributes:
        where: who failed, and how.
        found: what it last reported or did.
        kind: the class of the rank's error, if it reported one.
        follows: whether it only reports that another rank is gone.
        rank: whose it is, or -1.
        silent: whether nothing is heard any more, so that the others hang and report nothing.
    """

    where: str
    found: str
    kind: str = ""
    follows: bool = False
    rank: int = -1
    silent: bool = False


class Roll:
    """The state of one attempt, collected from the lifelines.

    Args:
        number: of the attempt.
        silence: seconds without a sign of life that a training rank is allowed.
        reject: ends a rank of another attempt.
    """

    def __init__(
        self, number: int, *, silence: float, reject: Callable[[Peer], object] = lambda peer: None
    ) -> None:
        self.number = number
        self.ranks: dict[int, Rank] = {}
        self.world: int | None = None
        self.nodes: int | None = None  # that take part
        self.ended: dict[Peer, str] = {}  # how the processes of a node ended, in words
        self.how: dict[int, str] = {}  # how the process of a rank ended, if not with status 0
        self.failures: list[Failure] = []
        self.saved = -1  # the newest step saved
        self.trained = False
        self._silence, self._reject = silence, reject
        self._of: dict[Peer, Rank] = {}

    def hear(self, event: Event) -> None:
        """Process an event of a rank's lifeline."""
        if event.kind == "said" and event.message.get("event") == "start":
            self._start(event.peer, event.message)
            return
        rank = self._of.get(event.peer)
        if rank is None or not rank.here:
            return
        if event.kind == "gone":
            rank.here = False
            if rank.last_word is None:
                where = f"{rank.name} died without a word"
                self.fail(Failure(where, f"it was: {rank.was}", rank=rank.number))
        elif event.kind == "silent":
            seconds = event.message["seconds"]
            self.fail(
                Failure(
                    f"nothing was heard from {rank.name} for {seconds:.0f} s: "
                    "its host is cut off or down, or the process is stopped",
                    f"it was: {rank.was}",
                    silent=True,
                )
            )
        else:
            self._take(rank, event.message)

    def exit(self, rank: int, how: str) -> None:
        """A rank's process has ended; `how` is "" for status 0."""
        if how:
            self.how[rank] = how
            if rank not in self.ranks:
                where = f"rank {rank} ended before it could report"
                self.fail(Failure(where, "", kind=USAGE if how == _USAGE_STATUS else "", rank=rank))

    def fail(self, failure: Failure) -> None:
        """Record a failure."""
        self.failures.append(failure)

    def launchers_ended(self) -> bool:
        """Whether every node's processes have ended."""
        return self.nodes is not None and len(self.ended) >= self.nodes

    def all_here(self) -> bool:
        """Whether every rank has started."""
        return self.world is not None and set(self.ranks) >= set(range(self.world))

    def missing(self) -> list[int]:
        """Ranks that have not started."""
        return sorted(set(range(self.world or 0)) - set(self.ranks))

    def all_ended(self) -> bool:
        """Whether every rank has said its last word or is gone."""
        return self.all_here() and not self.busy()

    def busy(self) -> list[Rank]:
        """Ranks that have started and not yet said their last word."""
        return [r for r in self.ranks.values() if r.here and r.last_word is None]

    def cause(self) -> Failure | None:
        """The first failure that is not a consequence of another."""
        causes = [failure for failure in self.failures if not failure.follows]
        return next(iter(causes or self.failures), None)

    def verdict(self) -> int:
        """The attempt's true exit status: 0 only if every rank said done."""
        cause = self.cause()
        if cause is not None and cause.kind in _HOPELESS:
            return STATUS_CONFIG
        words = {rank.last_word for rank in self.ranks.values()}
        if not self.all_here() or not words <= {"done", "stopped"}:
            return STATUS_FAILED
        return STATUS_STOPPED if "stopped" in words else 0

    def _start(self, peer: Peer, message: dict[str, Any]) -> None:
        number, world = int(message["rank"]), int(message["world"])
        if int(message["attempt"]) != self.number:
            self._reject(peer)
            return
        rank = Rank(number, str(message["host"]), int(message["pid"]), peer)
        other = self.ranks.get(number)
        if other is not None and other.here:
            self.fail(
                Failure(
                    f"rank {number} is there twice",
                    f"{other.name} and {rank.name}: a job within a job, or one that was "
                    "started by a launcher inside launch/supervise.py",
                )
            )
        self.ranks[number], self._of[peer] = rank, rank
        self.world = world if self.world is None else max(world, self.world)

    def _take(self, rank: Rank, message: dict[str, Any]) -> None:
        event = message.get("event")
        if isinstance(message.get("step"), int):
            rank.step = message["step"]
        if event in ("beat", "saved"):
            rank.doing = str(message.get("doing", rank.doing))
            # Before its first heartbeat it may load libraries for minutes in one call.
            rank.peer.patience = self._silence
            if rank.first_step is None:
                rank.first_step = rank.step
            self.trained = self.trained or rank.step != rank.first_step
        if event == "saved" and rank.step is not None:
            self.saved = max(self.saved, rank.step)
        if event in LAST_WORDS and rank.last_word is None:
            rank.last_word = str(event)
            if event == "failed":
                text = str(message.get("text", "")).strip()
                self.fail(
                    Failure(
                        f"{rank.name} failed",
                        text or f"it was: {rank.was}",
                        kind=str(message.get("kind", "")),
                        follows=bool(message.get("follows")),
                    )
                )
