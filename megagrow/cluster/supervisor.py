"""Starts a job, monitors its lifelines, ends it when it fails, and restarts it.

Its exit status is the truth about the job: 0 if every rank reported that it is done, 75 if all
were stopped by a signal and have saved, 78 if restarting would not help, else 1.
"""

from __future__ import annotations

import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megagrow.cluster import launchers, ranklog
from megagrow.cluster.hosts import Attempt, Fleet
from megagrow.cluster.lifeline import STATUS_STOPPED
from megagrow.cluster.lifeline_server import Exchange
from megagrow.cluster.roster import STATUS_CONFIG, STATUS_FAILED, Failure, Roll
from megagrow.cluster.signals import taking
from megagrow.errors import MegagrowError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_POLL_SECONDS = 0.1
_LAUNCHER_SECONDS = 20.0  # time for a launcher to end after its last rank


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds, and the number of restarts.

    Attributes:
        start: from the start until every rank has reported.
        silence: without a sign of life from a training rank; a rank that does not hear the
            supervisor for this long ends itself.
        grace: from the first failure until the other ranks are ended, so that they can report.
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
    """Runs a job to its end.

    Args:
        script: what every rank runs, with its arguments.
        fleet: where the ranks run.
        limits: time limits and number of restarts.
        port: for the lifelines; 0 picks a free one for each attempt.
        logs: a directory; each attempt gets a subdirectory.
    """

    def __init__(
        self,
        script: Sequence[str],
        *,
        fleet: Fleet,
        limits: Limits,
        port: int = 0,
        logs: Path | None = None,
    ) -> None:
        self._script, self._fleet, self._limits = list(script), fleet, limits
        self._port, self._logs = port, logs
        self._signal = 0
        self._cut_off: list[str] = []

    def run(self) -> int:
        """Start and restart until the job is done or cannot continue; returns the exit status."""
        with taking(SIGNALS, self._heard):
            status = self._attempts()
            self._fleet.finish(status)
        return status

    def _attempts(self) -> int:
        newest, in_vain, trained = -1, 0, False
        while True:
            roll = self._attempt()
            status = roll.verdict()
            trained = trained or roll.trained
            if self._signal and not trained and status == STATUS_FAILED:
                status = STATUS_STOPPED  # while ranks were starting: nothing is lost
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
            if not self._wait_before(in_vain):
                return STATUS_STOPPED
            self._script = launchers.resumed(self._script)

    def _wait_before(self, number: int) -> bool:
        """Wait before a restart; False if a signal arrived meanwhile."""
        wait = min(self._limits.backoff * 2 ** (number - 1), self._limits.longest)
        if self._cut_off:
            # Ranks that could not be reached end themselves after this time.
            wait = max(wait, 1.5 * self._limits.silence)
        _say(
            f"starting again from the last checkpoint in {wait:g} s "
            f"(number {number} of {self._limits.restarts} without a newer one)"
        )
        end = time.monotonic() + wait
        while time.monotonic() < end and not self._signal:
            time.sleep(_POLL_SECONDS)
        return not self._signal

    # --- one attempt ----------------------------------------------------------------------

    def _attempt(self) -> Roll:
        limits = self._limits
        roll = Roll(silence=limits.silence)
        token = secrets.token_hex(16)
        exchange = Exchange(
            token=token, port=self._port, silence=limits.silence, patience=limits.start
        )
        logs = _next_directory(self._logs)
        try:
            self._fleet.start(Attempt(self._script, exchange.port, token, logs))
            self._watch(exchange, roll)
        except MegagrowError as error:
            roll.fail(Failure(str(error), "", kind=_kind(error)))
        finally:
            self._end(exchange, roll)
        if roll.verdict() not in (0, STATUS_STOPPED):
            _report(roll, logs)
        return roll

    def _watch(self, exchange: Exchange, roll: Roll) -> None:
        """Monitor the job until it is over, one way or another."""
        limits, begin = self._limits, time.monotonic()
        failed = asked = over = None
        while True:
            for event in exchange.poll(_POLL_SECONDS):
                roll.hear(event)
                if asked is not None and event.message.get("event") == "start":
                    exchange.tell(event.peer, "stop", signal=self._signal)
            for failure in self._fleet.poll():
                roll.fail(failure)
            now = time.monotonic()
            for number in self._fleet.signals():
                self._signal = self._signal or number
            if self._signal and asked is None:
                asked = now
                name = signal.Signals(self._signal).name
                _say(f"{name}: {len(roll.busy())} ranks are told to save and stop")
                exchange.tell_all("stop", signal=self._signal)
            if roll.failures and failed is None:
                failed = now
            if failed is not None and (roll.all_ended() or now - failed > limits.grace):
                return
            if over is None and (roll.all_ended() or self._fleet.ended()):
                over = now
            if over is not None:
                if roll.all_ended() and (self._fleet.ended() or now - over > _LAUNCHER_SECONDS):
                    return
                # The ranks' last words may still arrive after their launcher has ended.
                if not roll.all_ended() and now - over > 2.0:
                    over = None
                    roll.fail(_left_alone(self._fleet.ended(), roll))
            if asked is not None and now - asked > limits.stop:
                roll.fail(_not_in_time("save after the signal", roll, limits.stop))
                return
            if not roll.all_here() and now - begin > limits.start and failed is None:
                roll.fail(_not_in_time("start", roll, limits.start))

    def _end(self, exchange: Exchange, roll: Roll) -> None:
        cause = roll.cause()
        first_line = cause.where.splitlines()[0] if cause is not None else "the job is over"
        exchange.tell_all("end", reason=f"the supervisor ends this job: {first_line}")
        end = time.monotonic() + 1.0
        while exchange.peers and time.monotonic() < end:
            exchange.poll(_POLL_SECONDS)
        # This closes the connections, and thereby ends every rank that got no order.
        exchange.close()
        self._cut_off = self._fleet.end()
        if self._cut_off:
            _say(
                f"could not end what may be left on {'; '.join(self._cut_off)}: ranks there end "
                f"themselves after {self._limits.silence:g} s without the supervisor"
            )

    # --- signals --------------------------------------------------------------------------

    def _heard(self, number: int, _: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice by hand: end at once, without saving
        # Python's own SIGINT would print a traceback in each rank; they handle SIGTERM.
        self._signal = self._signal or (signal.SIGTERM if number == signal.SIGINT else number)


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def _kind(error: MegagrowError) -> str:
    name = type(error).__name__
    return name if name == "ConfigError" else ""


def _left_alone(ended: str | None, roll: Roll) -> Failure:
    left = roll.busy()
    if left:
        found = f"{len(left)} ranks still run, for instance {left[0].name}, {left[0].was}"
    elif roll.ranks:
        found = f"of {roll.world} ranks, {_some(roll.missing())} never started"
    else:
        found = "no rank has started; see the output above"
    return Failure(ended or "the launcher ended", found)


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


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")


def _report(roll: Roll, logs: Path | None) -> None:
    """Report why it failed, in the form of megagrow's errors."""
    cause = roll.cause()
    if cause is None:
        return
    lines = [f"error: {cause.where}"]
    if cause.found:
        lines.append(f"  found:    {cause.found}")
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
