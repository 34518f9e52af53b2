"""Signals to the processes of a run at random moments: nothing may be lost.

Each attempt is a job of real processes that run `megagrow train`.  In a randomly drawn phase
(starting, training, validating, saving or growing) one or all of them get a SIGKILL, all of them
a SIGINT as from a terminal, or one a SIGSTOP, after which the job must end by itself.  The run is
then restarted until it finishes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import processes as started
from megagrow.checkpoint import NativeCheckpoint, list_steps, step_path
from megagrow.data.prepare import Request, prepare
from megagrow.errors import CheckpointError
from megagrow.report.log import read_metrics
from megagrow.state.boxes import whole

PHASES = ("starting", "training", "validating", "saving", "growing")
WEIGHTS = (2, 7, 2, 7, 7)  # relative frequency of each phase
_OVER = 90.0  # seconds that a job may take to end after a kill
_TIMELESS = {"seconds", "time", "peak_staging_bytes", "tokens_per_second", "layout"}
# A stopped rank is noticed after watch.stall or watch.slow: shorter than the run's own values.
_IMPATIENT = ("watch.stall=6", "watch.slow=15")


@dataclass(frozen=True)
class Strike:
    """One signal and its outcome.

    Attributes:
        run: index of the run, from 0.
        signal: its name.
        phase: what the victim was doing, one of `PHASES`.
        victims: the ranks that received it.
        step: step of the newest checkpoint before the attempt.
        seconds: from the signal to the end of the job.
        left: the newest checkpoint's step afterwards.
    """

    run: int
    signal: str
    phase: str
    victims: tuple[int, ...]
    step: int
    seconds: float
    left: int


@dataclass(frozen=True)
class Drawn:
    """A signal to send: in the `count`-th `phase`, `delay` seconds after it begins."""

    signal: signal.Signals
    phase: int
    count: int
    delay: float
    victims: tuple[int, ...]


class Campaign:
    """Signals over as many runs as needed.

    Args:
        config: the run's YAML file.
        directory: for data and runs; recreated.
        world: number of processes in a job.
        seed: of the random draws.
    """

    def __init__(self, config: Path, directory: Path, *, world: int, seed: int) -> None:
        self.config, self.directory, self.world = config, directory, world
        self.draw = random.Random(seed)
        self.strikes: list[Strike] = []
        self.faults: list[str] = []  # everything unexpected
        self.runs_done = 0
        # Each rank's current phase, with a counter of changes: 8 * count + phase.
        self._phases = started.CONTEXT.Array("l", world, lock=False)

    def run(self, wanted: Mapping[signal.Signals, int], *, minutes: float) -> None:
        """Run until this many of each signal were sent, or the time is up."""
        end = time.monotonic() + 60 * minutes
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        source = Path(json.__file__).parent  # text that exists on every machine
        prepare(
            Request(input=str(source), output=self.directory / "data", vocab_size=512, glob="*.py",
                    validation_fraction=0.1)
        )  # fmt: skip
        straight = self.directory / "undisturbed"
        if self._attempt(straight, None) != [0] * self.world:
            raise CheckpointError(f"{straight}: the undisturbed run failed",
                                  fix=f"see {straight}.log")  # fmt: skip
        result = outcome(straight)
        while self._left(wanted) and time.monotonic() < end:
            self._one_run(wanted, end, result)

    def _left(self, wanted: Mapping[signal.Signals, int]) -> dict[signal.Signals, int]:
        """How many of each signal remain to be sent."""
        given = Counter(strike.signal for strike in self.strikes)
        return {one: n - given[one.name] for one, n in wanted.items() if n > given[one.name]}

    def _one_run(
        self, wanted: Mapping[signal.Signals, int], end: float, result: dict[str, Any]
    ) -> None:
        """One run from start to end, with disturbances."""
        number = self.runs_done
        path = self.directory / f"run_{number:03d}"
        statuses: list[int | None] = []
        # A signal in an early phase prevents progress, so towards the end the run is left alone.
        while statuses != [0] * self.world:
            left = self._left(wanted) if time.monotonic() < end else {}
            before = newest(path)
            drawn = self._drawn(left) if left else None
            statuses = self._attempt(path, drawn)
            after = newest(path)
            if after < before:
                self.faults.append(f"{path.name}: checkpoint {before} was lost, {after} is left")
            if drawn is None and statuses != [0] * self.world:
                self.faults.append(f"{path.name}: ended with {statuses}, with no signal given")
                break
        found = outcome(path)
        for what in result:
            if found.get(what) != result[what]:
                self.faults.append(f"{path.name}: {what} differ from the undisturbed run's")
        self.runs_done += 1
        shutil.rmtree(path, ignore_errors=True)

    def _drawn(self, left: Mapping[signal.Signals, int]) -> Drawn:
        [given] = self.draw.choices(list(left), list(left.values()))
        [phase] = self.draw.choices(range(len(PHASES)), WEIGHTS)
        often = {1: self.draw.randint(1, 16), 2: self.draw.randint(1, 3)}
        count = often.get(phase, 1 if phase != 3 else self.draw.randint(1, 5))
        ranks = tuple(range(self.world))
        together = {signal.SIGKILL: self.draw.random() < 0.25, signal.SIGINT: True}
        victims = ranks if together.get(given) else (self.draw.choice(ranks),)
        return Drawn(given, phase, count, self.draw.random() ** 2 * 0.3, victims)

    def _attempt(self, path: Path, drawn: Drawn | None) -> list[int | None]:
        """Run one job; returns the exit statuses of its processes."""
        before = newest(path)
        self._phases[:] = [0] * self.world
        arguments = [f"--config={self.config}", f"run.dir={path}",
                     f"data.path={self.directory / 'data'}"]  # fmt: skip
        if drawn is not None and drawn.signal is signal.SIGSTOP:
            arguments += _IMPATIENT
        processes = started.start(
            "train",
            arguments,
            world=self.world,
            log=path.with_suffix(".log"),
            phases=self._phases,
        )
        reached = None
        try:
            if drawn is not None:
                reached = self._strike(processes, drawn)
            begin = time.monotonic()
            stopped = drawn is not None and drawn.signal is signal.SIGSTOP
            spared = drawn.victims if drawn is not None and stopped else ()
            hung = self._wait([p for rank, p in enumerate(processes) if rank not in spared])
        finally:
            for process in processes:
                process.kill()
                process.join()
        if hung:
            self.faults.append(f"{path.name}: {hung} processes did not end within {_OVER:g} s")
        if drawn is not None and reached is not None:
            self.strikes.append(
                Strike(
                    run=self.runs_done,
                    signal=drawn.signal.name,
                    phase=PHASES[reached],
                    victims=drawn.victims,
                    step=before,
                    seconds=round(time.monotonic() - begin, 2),
                    left=newest(path),
                )
            )
        return [process.exitcode for process in processes]

    def _strike(self, processes: Sequence[BaseProcess], drawn: Drawn) -> int | None:
        """Send the signal in its phase; returns the phase hit, or None if the job ended first."""
        first, seen, times = drawn.victims[0], 0, 0
        while all(process.is_alive() for process in processes):
            now = self._phases[first]
            if now != seen:
                seen = now
                times += now % 8 == drawn.phase
                if times >= drawn.count:
                    break
            time.sleep(0.0005)
        else:
            return None
        time.sleep(drawn.delay)
        if not all(process.is_alive() for process in processes):
            return None
        reached = self._phases[first] % 8
        for rank in drawn.victims:
            pid = processes[rank].pid
            assert pid is not None
            os.kill(pid, drawn.signal)
        return int(reached)

    @staticmethod
    def _wait(processes: Sequence[BaseProcess]) -> int:
        """Wait for all to end; returns the number that did not end in time."""
        dead_since = None
        while any(process.is_alive() for process in processes):
            if dead_since is None and not all(process.is_alive() for process in processes):
                dead_since = time.monotonic()
            if dead_since is not None and time.monotonic() - dead_since > _OVER:
                break
            time.sleep(0.005)
        return sum(process.is_alive() for process in processes)

    def result(self) -> dict[str, Any]:
        """All results, for JSON."""
        return {
            "world": self.world,
            "signals": len(self.strikes),
            "runs": self.runs_done,
            "faults": self.faults,
            "by_signal": {
                name: {
                    phase: _summary(
                        [s for s in self.strikes if s.signal == name and s.phase == phase]
                    )
                    for phase in PHASES
                }
                for name in dict.fromkeys(strike.signal for strike in self.strikes)
            },
            "every_signal": [asdict(strike) for strike in self.strikes],
        }


def _summary(strikes: Sequence[Strike]) -> dict[str, Any]:
    victims = Counter(
        "all ranks" if len(s.victims) > 1 else f"rank {s.victims[0]}" for s in strikes
    )
    return {
        "signals": len(strikes),
        "victims": dict(sorted(victims.items())),
        "longest_seconds_to_end": max((strike.seconds for strike in strikes), default=0.0),
    }


def newest(path: Path) -> int:
    """The step of a run's newest intact checkpoint, all checksums checked; -1 for none.

    Raises:
        CheckpointError: a committed checkpoint is damaged.
    """
    steps = list_steps(path / "checkpoints")
    if not steps:
        return -1
    NativeCheckpoint.open(step_path(path / "checkpoints", steps[-1])).verify()
    return steps[-1]


def outcome(path: Path) -> dict[str, Any]:
    """What two runs must have in common, bit for bit: the log except times, and the tensors."""
    lines = [
        {key: value for key, value in line.items() if key not in _TIMELESS}
        for line in read_metrics(path / "metrics.jsonl")
    ]
    result: dict[str, Any] = {
        event: {json.dumps(line, sort_keys=True) for line in lines if line["event"] == event}
        for event in ("step", "growth", "validation")
    }
    steps = list_steps(path / "checkpoints")
    checkpoint = NativeCheckpoint.open(step_path(path / "checkpoints", steps[-1]))
    result["run states"] = checkpoint.run_state
    result["tensors"] = {
        (tensor.name, slot.name): _bytes(
            checkpoint.read(tensor.name, slot.name, whole(tensor.shape))
        )
        for tensor in checkpoint.catalog
        for slot in checkpoint.slots
    }
    return result


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()


def table(result: dict[str, Any]) -> str:
    """The campaign as lines of text."""
    head = f"{'signal':<9}{'phase':<12}{'given':>6}  {'longest s to end':>17}  victims"
    lines = [head]
    for name, phases in result["by_signal"].items():
        for phase, row in phases.items():
            who = ", ".join(f"{victim}: {count}" for victim, count in row["victims"].items())
            lines.append(
                f"{name:<9}{phase:<12}{row['signals']:>6}  {row['longest_seconds_to_end']:>17.2f}"
                f"  {who}"
            )
    lines.append(
        f"\n{result['signals']} signals over {result['runs']} runs of {result['world']} processes; "
        + (
            "every run came to its end with the losses, growths and tensors of the undisturbed "
            "run, bit for bit, and no checkpoint was lost"
            if not result["faults"]
            else "FAULTS:\n  " + "\n  ".join(result["faults"])
        )
    )
    return "\n".join(lines)
