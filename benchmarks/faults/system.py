"""Signals, disk faults and concurrent jobs, injected into every command that writes.

Each time, the command is run with one fault in it.  If it exits with status 0, it must have written
what the undisturbed command writes; otherwise it is run again, and then must have.  No other files
may be left, no process may keep running, and no error may be a traceback.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.faults import processes as started
from benchmarks.faults.commands import Command, commands, write_savings
from megagrow.errors import CheckpointError
from megagrow.report.log import read_metrics

_OVER = 300.0  # seconds that a command may take to end after a fault, on a busy machine
_CALLS = {"w": "write", "f": "fsync", "r": "rename", "m": "mkdir", "o": "open"}


@dataclass(frozen=True)
class Strike:
    """One fault and its outcome.

    Attributes:
        at: seconds after the start, or which call of its kind failed.
        statuses: exit statuses of the processes (negative: the signal that ended one).
        seconds: from start to end.
        again: whether the command had to be run again.
    """

    command: str
    fault: str
    at: float | str
    statuses: tuple[int | None, ...]
    seconds: float
    again: bool


@dataclass(frozen=True)
class _Undisturbed:
    """The behaviour of a command without a fault.

    Attributes:
        calls: number of system calls per process that can fail, by name.
        beside: names in the attempt's directory when it is done.
    """

    outcome: Any
    seconds: float
    calls: Counter[str]
    beside: frozenset[str]


class System:
    """A campaign over all commands.

    Args:
        config: the YAML file of the training run.
        directory: for everything; recreated.
        seed: of the random draws.
        only: only run commands whose names start with this.
    """

    def __init__(self, config: Path, directory: Path, *, seed: int, only: str = "") -> None:
        self.config, self.directory, self.only = config, directory, only
        self.draw = random.Random(seed)
        self.strikes: list[Strike] = []
        self.faults: list[str] = []  # everything unexpected

    def run(self, *, strikes: int, minutes: float) -> None:
        """Run until this many faults were injected or the time is up; commands take turns."""
        end = time.monotonic() + 60 * minutes
        shutil.rmtree(self.directory, ignore_errors=True)
        base = self.directory / "base"
        base.mkdir(parents=True)
        self._make_sources(base)
        chosen = [c for c in commands(base, self.config) if c.name.startswith(self.only)]
        known = [self._undisturbed(command) for command in chosen]
        weights = [sum(command.faults.values()) for command in chosen]
        while len(self.strikes) < strikes and time.monotonic() < end:
            # The one furthest behind its share.
            given = Counter(strike.command for strike in self.strikes)
            index = min(range(len(chosen)), key=lambda i: given[chosen[i].name] / weights[i])
            self._strike(chosen[index], known[index])

    def _make_sources(self, base: Path) -> None:
        text = base / "text"
        text.mkdir()
        for path in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:  # found everywhere
            shutil.copy(path, text)
        prepare = commands(base, self.config)[0]
        self._must(prepare.command, prepare.arguments(base / "prepared"), base / "prepared.log")
        (base / "prepared" / "out").rename(base / "data")
        sizes = ("layers=4", "hidden=128", "heads=4", "ffn=512", "sequence=64")
        self._must(
            "train",
            [f"--config={self.config}", f"run.dir={base / 'large'}",
             f"data.path={base / 'data'}", *(f"model.{size}" for size in sizes),
             "stages=[{until: {steps: 4}}]", "schedule.warmup=1"],
            base / "large.log",
        )  # fmt: skip
        write_savings(base)

    @staticmethod
    def _must(command: str, arguments: Sequence[str], log: Path) -> None:
        [process] = started.start(command, arguments, world=0, log=log)
        process.join()
        if process.exitcode:
            raise CheckpointError(f"{command} failed before any fault", fix=f"see {log}")

    # --- one command, one fault -----------------------------------------------------------

    def _undisturbed(self, command: Command) -> _Undisturbed:
        path = self._place(command, "undisturbed")
        log = path / "log"
        begin = time.monotonic()
        watching = {"FAULT_CALL": "any", "FAULT_PATH": self._part(command, path)}
        statuses, hung = self._wait(self._start(command, path, watching))
        seconds = time.monotonic() - begin
        if set(statuses) != {0}:
            raise CheckpointError(
                f"{command.name}: failed undisturbed",
                found=f"no end within {_OVER:g} s" if hung else f"exit statuses {statuses}",
                fix=f"see {log}",
            )
        calls = Counter(Path(f"{log}.calls").read_text())
        if not calls:
            raise CheckpointError(
                f"{command.name}: none of its system calls passed through the shim",
                expected="a forking process with the shim loaded",
                fix="start it with `processes.begin` right before the campaign",
            )
        found = _Undisturbed(command.outcome(path), seconds, calls, _beside(path))
        shutil.rmtree(path)
        return found

    def _strike(self, command: Command, known: _Undisturbed) -> None:
        given = Counter(s.fault for s in self.strikes if s.command == command.name)
        fault = min(command.faults, key=lambda name: given[name] / command.faults[name])
        number = len(self.strikes)
        path = self._place(command, f"{number:04d}")
        name = f"{number:04d} {command.name}, {fault}"
        begin = time.monotonic()
        environment, at = self._environment(fault, command, path, known)
        running = self._start(command, path, environment)
        if fault.startswith("SIG"):
            at = round(self.draw.uniform(0.0, 1.1) * known.seconds, 3)
            time.sleep(at)
            first = 1 if "first" in fault else len(running)
            for process in running[:first]:
                _signal(process, signal.Signals[fault.split()[0]], group=first == len(running))
        elif fault == "two at once":
            at = round(self.draw.uniform(0.0, 0.8) * known.seconds * self.draw.choice((0, 1)), 3)
            time.sleep(at)
            running = [*running, *self._start(command, path, {})]
        statuses, hung = self._wait(running)
        seconds = time.monotonic() - begin
        self._check_ends(name, path, running, hung, killed="SIGKILL" in fault)
        again = 0 not in statuses if fault == "two at once" else set(statuses) != {0}
        if fault == "two at once" and again:
            self.faults.append(f"{name}: neither came to its end: {statuses}")
        # The second may have waited (run.wait) until there was nothing left to do.
        both = fault == "two at once" and command.world and set(statuses) == {0}
        if both and not _came_too_late(path / "out"):
            self.faults.append(f"{name}: both jobs trained in one directory")
        if again:
            # A partial lock left by a kill is removed only after a long silence.
            for left in path.glob(".*.lock.*"):
                os.utime(left, (0, 0))
            whole = _is_whole(command, path, known)
            repeated, _ = self._wait(self._start(command, path, {}))
            # One that was killed after its commit finds its result there, and overwrites none.
            if set(repeated) != {0} and not whole:
                self.faults.append(f"{name} at {at}: run again, it ended with {repeated}")
        self._compare(name, at, command, path, known)
        self.strikes.append(Strike(command.name, fault, at, statuses, round(seconds, 2), again))
        if not any(text.startswith(name) for text in self.faults):
            shutil.rmtree(path)

    def _environment(
        self, fault: str, command: Command, path: Path, known: _Undisturbed
    ) -> tuple[dict[str, str], float | str]:
        """The shim's variables, and which call fails."""
        hows = {"ENOSPC": "ENOSPC", "EIO": "EIO", "read-only": "EROFS"}
        how = hows.get(fault.split()[0])
        if how is None:
            return {}, 0.0
        # A full disk fails writes of data and names; a broken one fails anything.
        kinds = "wm" if how == "ENOSPC" else "wfrm"
        letters = [letter for letter in kinds if known.calls[letter]]
        letter = self.draw.choices(letters, [known.calls[one] ** 0.5 for one in letters])[0]
        call, at = _CALLS[letter], self.draw.randint(1, known.calls[letter])
        if how == "EROFS":
            call, at = self.draw.choice(("open", "mkdir", "rename")), 1
            at = self.draw.randint(1, max(1, known.calls[call[0]]))
        settings = {"FAULT_CALL": call, "FAULT_PATH": self._part(command, path),
                    "FAULT_AT": str(at), "FAULT_HOW": how}  # fmt: skip
        if "stays" in fault or how == "EROFS":
            settings["FAULT_STAY"] = "1"
        return settings, f"{call} {at}"

    def _compare(
        self, name: str, at: float | str, command: Command, path: Path, known: _Undisturbed
    ) -> None:
        try:
            found = command.outcome(path)
        except Exception as error:
            self.faults.append(f"{name} at {at}: the result cannot be read: {error!r}")
            return
        differ = [key for key in known.outcome if found.get(key) != known.outcome[key]]
        if differ:
            self.faults.append(f"{name} at {at}: differ from the undisturbed: {differ}")
        left = _beside(path) - known.beside
        if left:
            self.faults.append(f"{name} at {at}: left behind: {sorted(left)}")

    def _check_ends(
        self, name: str, path: Path, running: Sequence[BaseProcess], hung: int, *, killed: bool
    ) -> None:
        if hung:
            self.faults.append(f"{name}: {hung} processes did not end within {_OVER:g} s")
        alive = [p for p in running if not _group_ends(p)]
        if alive:
            self.faults.append(f"{name}: left processes running")
            for process in alive:
                _signal(process, signal.SIGKILL, group=True)
        log = path / "log"  # absent if it was killed before writing anything
        text = log.read_text(errors="replace") if log.exists() else ""
        defect = any(process.exitcode == started.DEFECT for process in running)
        if defect or (not killed and "Traceback (most recent call last)" in text):
            self.faults.append(f"{name}: a traceback, see {log}")

    # --- helpers --------------------------------------------------------------------------

    def _place(self, command: Command, name: str) -> Path:
        path = self.directory / f"{name}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    @staticmethod
    def _part(command: Command, path: Path) -> str:
        # The attempt's own directory and anything next to its result, but not its log.
        return command.part if command.part != "out" else f"{path}/out"

    @staticmethod
    def _start(command: Command, path: Path, environment: dict[str, str]) -> list[BaseProcess]:
        return started.start(
            command.command,
            command.arguments(path),
            world=command.world,
            log=path / "log",
            environment=environment,
        )

    @staticmethod
    def _wait(running: Sequence[BaseProcess]) -> tuple[tuple[int | None, ...], int]:
        """(exit statuses, number of processes that had to be killed)."""
        end = time.monotonic() + _OVER
        for process in running:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in running if process.is_alive()]
        for process in hung:
            _signal(process, signal.SIGKILL, group=True)
            process.join()
        return tuple(process.exitcode for process in running), len(hung)

    def result(self) -> dict[str, Any]:
        """All results, for JSON."""
        names = dict.fromkeys(strike.command for strike in self.strikes)
        return {
            "strikes": len(self.strikes),
            "faults": self.faults,
            "by_command": {
                name: dict(Counter(s.fault for s in self.strikes if s.command == name))
                for name in names
            },
            "run_again": {
                name: sum(s.again for s in self.strikes if s.command == name) for name in names
            },
            "every_strike": [asdict(strike) for strike in self.strikes],
        }


def table(result: dict[str, Any]) -> str:
    """The campaign as lines of text."""
    lines = [f"{'command':<32}{'faults':>7}{'run again':>11}  of which"]
    for name, faults in result["by_command"].items():
        kinds = ", ".join(f"{fault}: {count}" for fault, count in faults.items())
        again = result["run_again"][name]
        lines.append(f"{name:<32}{sum(faults.values()):>7}{again:>11}  {kinds}")
    told = (
        "each command, run again where it failed, gave the undisturbed result; nothing was left "
        "beside it, and no process"
        if not result["faults"]
        else "FAULTS:\n  " + "\n  ".join(result["faults"])
    )
    lines.append(f"\n{result['strikes']} faults; {told}")
    return "\n".join(lines)


def _is_whole(command: Command, path: Path, known: _Undisturbed) -> bool:
    """Whether the result is complete, and the undisturbed command's."""
    try:
        return bool(command.outcome(path) == known.outcome)
    except Exception:
        return False


def _beside(path: Path) -> frozenset[str]:
    """Names in an attempt's directory, and hidden or temporary ones at any depth below."""
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith("log")}
    for entry in path.rglob("*"):
        if entry.name.startswith(".") or "tmp" in entry.name:
            names.add(entry.relative_to(path).as_posix())
    return frozenset(names)


def _came_too_late(run: Path) -> bool:
    """Whether every later start of a run found it finished, so that it trained nothing.

    A start that sees this from the last checkpoint alone leaves no line in the log.
    """
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["event"] == "step"]
    starts = [line["step"] for line in lines if line["event"] in ("run_start", "resume")]
    return all(step == steps[-1] for step in starts[1:])


def _signal(process: BaseProcess, which: signal.Signals, *, group: bool) -> None:
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, which)
        else:
            os.kill(process.pid, which)


def _group_ends(process: BaseProcess, seconds: float = 30.0) -> bool:
    """Whether the last process of a command's group ends by itself."""
    end = time.monotonic() + seconds
    assert process.pid is not None
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
