"""Monitors a run from inside each rank: progress, heartbeats, and which rank blocks the others.

A thread samples what the main thread does.  Every rank publishes its status through the job's
key-value store, so that a job that hangs can say which rank is the cause, under any launcher.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import linecache
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol, TextIO

from megagrow import background
from megagrow.background import Loop
from megagrow.cluster import lifeline
from megagrow.config import Config, WatchConfig
from megagrow.engine.comm import Comm
from megagrow.train.health.heartbeats import Heartbeats, heartbeats

LOGS = "logs"
STALLED = 1  # exit status of a rank that the watch ends
_SAMPLE_SECONDS = 0.05
# What a store raises if its host is gone: torch.distributed's own errors are RuntimeErrors.
_STORE_ERRORS = (RuntimeError, OSError)
_number = itertools.count()  # several jobs may run in one process, one after the other
# A frame in one of these files, or a line with one of these words, waits for other ranks.
_COLLECTIVE_FILES = ("distributed_c10d.py", "engine/comm.py")
_WAITING_WORDS = (".wait(", ".synchronize(")


class Store(Protocol):
    """The part of `torch.distributed.Store` that the watch uses, on its own connection."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""
        ...

    def multi_get(self, keys: Sequence[str]) -> Sequence[bytes]:
        """Values of keys, waiting for those that do not exist yet."""
        ...

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys exist."""
        ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set `desired` if the key has `expected` or is new; returns the resulting value."""
        ...


@dataclass(frozen=True)
class Beat:
    """A rank's status report.

    Attributes:
        rank, host, pid: its identity.
        count: grows with every report; if it stops growing, the rank is dead or stopped.
        doing: what it last began, in words.
        waiting: the collective that its main thread is in, or "".
        idle: seconds since it last made progress.
    """

    rank: int
    host: str
    pid: int
    count: int
    doing: str
    waiting: str
    idle: float

    @property
    def name(self) -> str:
        """The rank, its host and process, as text."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


class Watch:
    """The watch of one rank; a context manager that runs its thread.

    Args:
        rank, world: of this process.
        config: the limits.
        store: the job's store, on a connection of the watch's own; None for a single process.
        log: this rank's own log file, created when the first line is written.
        exit: ends the process (replaced in tests).
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        config: WatchConfig,
        store: Store | None,
        log: Path,
        exit: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank, self.world, self.config, self.log = rank, world, config, log
        self._store, self._exit = store, exit
        self._host, self._count = socket.gethostname(), 0
        self._key = f"megagrow/{next(_number)}"
        self._doing, self._limit, self._since = "starting", config.slow, time.monotonic()
        self._step = 0
        self._samples = [0, 0]  # all, and those that found the main thread waiting for others
        self._busy_from = time.monotonic()
        self._main = threading.get_ident()
        self._next_beat = 0.0
        self._external = Heartbeats(None, self.note)
        self._thread = Loop("megagrow-watch", self._look, every=_SAMPLE_SECONDS)
        # Report no more often than is useful, and do not overload the store of a large job.
        self._period = max(min(1.0, config.stall / 4), world / 1000)

    # --- called by the main thread ----------------------------------------------------------

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.stop(timeout=2 * self._period)

    def begin(self, what: str, *, step: int, slow: bool = False) -> None:
        """Say what begins now; this counts as progress.

        Args:
            what: in words, for instance ``step 41``.
            step: number of optimizer steps done.
            slow: whether it may take `watch.slow` seconds rather than `watch.stall`.
        """
        self._doing, self._step, self._since = what, step, time.monotonic()
        self._limit = self.config.slow if slow else self.config.stall
        self._external.send()

    def busy_share(self) -> float:
        """The share of time since the last call in which this rank did not wait for others."""
        seen, waiting = self._samples
        self._samples = [0, 0]
        return 1.0 - waiting / seen if seen else 1.0

    def note(self, text: str) -> None:
        """Write a line to this rank's own log."""
        with contextlib.suppress(OSError), self._open_log() as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", file=file)

    def explain(self) -> str:
        """Which rank caused this one to lose the others; waits for a few heartbeats."""
        if self._store is None:
            return ""
        try:
            looks = self._two_looks()
            return blame(*looks, world=self.world)
        except _STORE_ERRORS as error:
            return f"rank 0 answers no more, or its host is cut off ({_first_line(error)})"
        except Exception as error:
            background.report("the watch, finding the cause", error)
            return f"the cause could not be found ({type(error).__name__}: {_first_line(error)})"

    def speaks_first(self) -> bool:
        """Whether this rank is the first to report a failure, so that the others need not."""
        if self._store is None:
            return True
        try:
            mine = str(self.rank)
            return self._store.compare_set(f"{self._key}/speaker", "", mine).decode() == mine
        except _STORE_ERRORS:
            return True  # there is no rank to ask
        except Exception as error:
            background.report("the watch, choosing who reports the failure", error)
            return True

    # --- the thread -------------------------------------------------------------------------

    def _look(self) -> None:
        """One iteration.  No part may prevent the last one, which ends the job, from running."""
        waiting, asked_to_end = "", False
        with self._thread.faults.reported("looking at what the main thread does"):
            waiting = self._waiting()
        self._samples[0] += 1
        self._samples[1] += bool(waiting)
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + self._period
        idle = now - self._since
        with self._thread.faults.reported("telling the others of this rank"):
            lifeline.say("beat", step=self._step, doing=self._doing)
            asked_to_end = not self._beat(waiting, idle)
        if asked_to_end:
            self._end()
        elif idle > self._limit:
            self._stalled(idle)

    def _beat(self, waiting: str, idle: float) -> bool:
        """Publish this rank's status; False if another rank has found that the job hangs."""
        if self._store is None:
            return True
        self._count += 1
        beat = Beat(
            self.rank, self._host, os.getpid(), self._count, self._doing, waiting, round(idle, 1)
        )
        try:
            self._store.set(f"{self._key}/beat/{self.rank}", json.dumps(asdict(beat)))
            return not self._store.check([f"{self._key}/ending"])
        except _STORE_ERRORS:
            return True  # the store's host is gone: collectives or the stall limit will show it

    def _stalled(self, idle: float) -> None:
        """End this rank, after reporting the stall as far as possible."""
        with self._thread.faults.reported("telling of a stall"):
            self._tell_of_stall(idle)
        with self._thread.faults.reported("writing stacks"):
            self._dump_stacks()
        time.sleep(2.5 * self._period)  # for the others to write theirs
        self._leave()

    def _tell_of_stall(self, idle: float) -> None:
        cause = self.explain() if self._store is not None else "it is the only rank"
        text = (
            f"error: no progress for {idle:.0f} s\n"
            f"  found:    rank {self.rank} on {self._host} was doing: {self._doing}; {cause}\n"
            f"  expected: progress within watch.stall = {self.config.stall:g} s "
            f"(watch.slow = {self.config.slow:g} s while starting, growing and saving)\n"
            f"  fix:      the stacks of all ranks are in {self.log.parent}; then resume from the "
            "last checkpoint with --resume auto, or raise watch.stall"
        )
        if self.speaks_first():
            print(text, file=sys.stderr, flush=True)
        lifeline.say("failed", text=text)
        with contextlib.suppress(*_STORE_ERRORS):
            if self._store is not None:
                self._store.set(f"{self._key}/ending", str(self.rank))
        self.note(text)

    def _end(self) -> None:
        with self._thread.faults.reported("writing stacks"):
            self._dump_stacks()
        self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is closed, or its disk is full
            sys.stderr.flush()
        self._exit(STALLED)

    def _waiting(self) -> str:
        frame = sys._current_frames().get(self._main)
        return waits_in(frame) if frame is not None else ""

    def _two_looks(self) -> tuple[list[Beat], list[Beat]]:
        """The heartbeats of all ranks, now and two periods later."""
        first = self._beats()
        for _ in range(3):
            time.sleep(0.8 * self._period)
            # This rank is alive and looking; it must not be taken for dead.
            self._beat(self._waiting(), time.monotonic() - self._since)
        came_up = {beat.rank for beat in first}
        return first, [beat for beat in self._beats() if beat.rank in came_up]

    def _beats(self) -> list[Beat]:
        """The heartbeats of the ranks that have started."""
        assert self._store is not None
        keys = [f"{self._key}/beat/{rank}" for rank in range(self.world)]
        there = [key for key in keys if self._store.check([key])]
        return [Beat(**json.loads(value)) for value in self._store.multi_get(there)]

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError), self._open_log() as file:
            print(f"stacks of rank {self.rank} on {self._host}:", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)

    def _open_log(self) -> TextIO:
        # Not the parents: a run.dir that was removed must not be recreated just for logs.
        self.log.parent.mkdir(exist_ok=True)
        return open(self.log, "a", encoding="utf-8")


def waits_in(frame: FrameType) -> str:
    """The collective that a stack waits in, or "".

    An estimate: Python sees the call of a collective, not what a GPU stream waits for.
    """
    innermost, found = frame, ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith(_COLLECTIVE_FILES):
            found = frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    if found:
        return found
    number = innermost.f_lineno  # None at an instruction without a line
    line = linecache.getline(innermost.f_code.co_filename, number) if number is not None else ""
    return innermost.f_code.co_name if any(word in line for word in _WAITING_WORDS) else ""


def blame(first: Sequence[Beat], then: Sequence[Beat], *, world: int) -> str:
    """Which ranks block the others, from two rounds of heartbeats.

    In order: ranks that never started; ranks whose heartbeats stopped; ranks that wait for no
    one while others do; the rank that has gone longest without progress.
    """
    missing = sorted(set(range(world)) - {beat.rank for beat in then})
    if missing:
        return f"ranks {', '.join(map(str, missing))} never came up"
    silent = [b for a, b in zip(first, then, strict=True) if a.count == b.count]
    if silent:
        return "; ".join(f"{b.name} is gone or stopped; it was doing: {b.doing}" for b in silent)
    busy = [b for b in then if not b.waiting]
    if busy and len(busy) < len(then):
        return "; ".join(
            f"{b.name} is doing: {b.doing}, while the others wait for it in "
            f"{next(o.waiting for o in then if o.waiting)}"
            for b in busy
        )
    slowest = max(then, key=lambda b: b.idle)
    where = f", waiting in {slowest.waiting}" if slowest.waiting else ""
    return f"longest without progress: {slowest.name}, doing: {slowest.doing}{where}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def watching(comm: Comm, config: Config) -> Iterator[Watch]:
    """Run this rank's watch for the duration of the block."""
    watch = _watch(comm, config, comm.store() if comm.world > 1 else None)
    comm.limit_collectives(config.watch.slow)
    with (
        watch,
        _stacks_on_request(watch.log),
        background.also_reporting_to(watch.note),
        heartbeats(watch.note) as watch._external,
    ):
        watch.note(f"rank {comm.rank} of {comm.world} on {socket.gethostname()}, pid {os.getpid()}")
        yield watch


def unwatched(comm: Comm, config: Config) -> Watch:
    """A watch whose thread is never started: it accepts calls and does nothing."""
    return _watch(comm, config, None)


def _watch(comm: Comm, config: Config, store: Store | None) -> Watch:
    log = Path(config.run.dir) / LOGS / f"rank_{comm.rank:05d}.log"
    return Watch(rank=comm.rank, world=comm.world, config=config.watch, store=store, log=log)


@contextlib.contextmanager
def _stacks_on_request(log: Path) -> Iterator[None]:
    """Within the block, SIGUSR2 writes this process's stacks to its log, and so does a crash."""
    with contextlib.ExitStack() as held:
        # A fault of the directory is reported where the run's own log is opened.
        with contextlib.suppress(OSError):
            log.parent.mkdir(exist_ok=True)
            file = held.enter_context(open(log, "a", encoding="utf-8"))
            faulthandler.enable(file)
            held.callback(faulthandler.disable)
            faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
            held.callback(faulthandler.unregister, signal.SIGUSR2)
        yield
