"""Kills the processes of a run at random moments, again and again, and sees that nothing is lost.

Each attempt is a job of real processes that run `launch/pretrain.py`.  They are forked from a
process that has imported everything, since an import takes longer than the run.  One or all of
them get a SIGKILL in a phase that was drawn: starting, training, validating, saving or growing.
Then the run is started again, until it comes to its end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagrow.bench.jobs import rank_environment
from megagrow.checkpoint import NativeCheckpoint, list_steps, step_path
from megagrow.data.prepare import Request, prepare
from megagrow.errors import CheckpointError
from megagrow.report.log import read_metrics
from megagrow.state.boxes import whole

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
PHASES = ("starting", "training", "validating", "saving", "growing")
WEIGHTS = (2, 7, 2, 7, 7)  # how often each is drawn
_FIRST_WORDS = {"starting": 0, "step": 1, "end": 1, "validation": 2, "saving": 3, "growing": 4}
_OVER = 90.0  # seconds that a job may take to end after a kill
_TIMELESS = {"seconds", "time", "peak_staging_bytes", "tokens_per_second", "layout"}

_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Kill:
    """One kill, and what came of it.

    Attributes:
        run: number of the run, from 0.
        phase: what the victim was doing, of `PHASES`.
        victims: the ranks that were killed.
        step: steps of the newest checkpoint before the attempt.
        seconds: from the kill to the end of the job.
        left: the newest checkpoint's step afterwards.
    """

    run: int
    phase: str
    victims: tuple[int, ...]
    step: int
    seconds: float
    left: int


class Campaign:
    """Kills over as many runs as it takes.

    Args:
        config: the run's YAML file.
        directory: for data and runs; made anew.
        world: processes of a job.
        seed: of what is drawn.
    """

    def __init__(self, config: Path, directory: Path, *, world: int, seed: int) -> None:
        self.config, self.directory, self.world = config, directory, world
        self.draw = random.Random(seed)
        self.kills: list[Kill] = []
        self.faults: list[str] = []  # whatever should not be
        self.runs_done = 0
        # One in the stead of tests' pytest: what every rank needs before it can begin.
        _CONTEXT.set_forkserver_preload(["megagrow.train.loop", "torch._dynamo"])
        # The phase that each rank is in, counted up at every change: 8 * count + phase.
        self._phases = _CONTEXT.Array("l", world, lock=False)

    def run(self, *, kills: int, minutes: float) -> None:
        """Go on until there were so many kills, or for so long."""
        end = time.monotonic() + 60 * minutes
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        source = Path(json.__file__).parent  # text that every machine has
        prepare(
            Request(input=str(source), output=self.directory / "data", vocab_size=512, glob="*.py",
                    validation_fraction=0.1)
        )  # fmt: skip
        straight = self.directory / "undisturbed"
        if self._attempt(straight, kill=None) != [0] * self.world:
            raise CheckpointError(f"{straight}: the undisturbed run failed",
                                  mend=f"see {straight}.log")  # fmt: skip
        wanted = outcome(straight)
        while len(self.kills) < kills and time.monotonic() < end:
            self._one_run(kills, end, wanted)

    def _one_run(self, kills: int, end: float, wanted: dict[str, Any]) -> None:
        """One run from its start to its end, killed on the way."""
        number = self.runs_done
        path = self.directory / f"run_{number:03d}"
        statuses: list[int | None] = []
        # A kill in an early phase makes no headway; towards the end the run is let be.
        while statuses != [0] * self.world:
            enough = len(self.kills) >= kills or time.monotonic() > end
            before = newest(path)
            drawn = None if enough else self._drawn()
            statuses = self._attempt(path, kill=drawn)
            after = newest(path)
            if after < before:
                self.faults.append(f"{path.name}: checkpoint {before} was lost, {after} is left")
            if drawn is None and statuses != [0] * self.world:
                self.faults.append(f"{path.name}: ended with {statuses} though nobody killed it")
                break
        found = outcome(path)
        for what in wanted:
            if found.get(what) != wanted[what]:
                self.faults.append(f"{path.name}: {what} differ from the undisturbed run's")
        self.runs_done += 1
        shutil.rmtree(path, ignore_errors=True)

    def _drawn(self) -> tuple[int, int, float, tuple[int, ...]]:
        """A phase, its how manieth time, how long after its begin, and who."""
        [phase] = self.draw.choices(range(len(PHASES)), WEIGHTS)
        often = {1: self.draw.randint(1, 16), 2: self.draw.randint(1, 3)}
        count = often.get(phase, 1 if phase != 3 else self.draw.randint(1, 5))
        ranks = tuple(range(self.world))
        victims = ranks if self.draw.random() < 0.25 else (self.draw.choice(ranks),)
        return phase, count, self.draw.random() ** 2 * 0.3, victims

    def _attempt(
        self, path: Path, *, kill: tuple[int, int, float, tuple[int, ...]] | None
    ) -> list[int | None]:
        """One job; returns the exit statuses of its processes."""
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        before = newest(path)
        self._phases[:] = [0] * self.world
        overrides = [f"run.dir={path}", f"data.path={self.directory / 'data'}"]
        arguments = ["--config", str(self.config), *overrides]
        log = path.with_suffix(".log")
        processes = [
            _CONTEXT.Process(
                target=_rank_main,
                args=(rank, self.world, store.port, self._phases, arguments, str(log)),
                daemon=True,
            )
            for rank in range(self.world)
        ]
        for process in processes:
            process.start()
        killed = None
        try:
            if kill is not None:
                killed = self._kill(processes, *kill)
            begin = time.monotonic()
            hung = self._wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if hung:
            self.faults.append(f"{path.name}: ranks {hung} did not end within {_OVER:g} s")
        if killed is not None:
            victims = kill[3] if kill is not None else ()
            self.kills.append(
                Kill(
                    run=self.runs_done,
                    phase=PHASES[killed],
                    victims=victims,
                    step=before,
                    seconds=round(time.monotonic() - begin, 2),
                    left=newest(path),
                )
            )
        return [process.exitcode for process in processes]

    def _kill(
        self,
        processes: Sequence[BaseProcess],
        phase: int,
        count: int,
        delay: float,
        victims: tuple[int, ...],
    ) -> int | None:
        """Kill in a phase; returns the phase it came to, or None if the job ended before."""
        first, seen, times = victims[0], 0, 0
        while all(process.is_alive() for process in processes):
            now = self._phases[first]
            if now != seen:
                seen = now
                times += now % 8 == phase
                if times >= count:
                    break
            time.sleep(0.0005)
        else:
            return None
        time.sleep(delay)
        if not all(process.is_alive() for process in processes):
            return None
        reached = self._phases[first] % 8
        for rank in victims:
            pid = processes[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        return int(reached)

    @staticmethod
    def _wait(processes: Sequence[BaseProcess]) -> list[int]:
        """Wait for all to end; returns the ranks that did not in time."""
        dead_since = None
        while any(process.is_alive() for process in processes):
            if dead_since is None and not all(process.is_alive() for process in processes):
                dead_since = time.monotonic()
            if dead_since is not None and time.monotonic() - dead_since > _OVER:
                break
            time.sleep(0.005)
        return [rank for rank, process in enumerate(processes) if process.is_alive()]

    def result(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "benchmark": "faults",
            "world": self.world,
            "kills": len(self.kills),
            "runs": self.runs_done,
            "faults": self.faults,
            "by_phase": {
                phase: _summary([kill for kill in self.kills if kill.phase == phase])
                for phase in PHASES
            },
            "every_kill": [asdict(kill) for kill in self.kills],
        }


def _summary(kills: Sequence[Kill]) -> dict[str, Any]:
    victims = Counter("all ranks" if len(k.victims) > 1 else f"rank {k.victims[0]}" for k in kills)
    return {
        "kills": len(kills),
        "victims": dict(sorted(victims.items())),
        "longest_seconds_to_end": max((kill.seconds for kill in kills), default=0.0),
    }


def newest(path: Path) -> int:
    """The newest checkpoint of a run that is whole, every checksum compared; -1 for none.

    Raises:
        CheckpointError: a committed one is damaged.
    """
    steps = list_steps(path / "checkpoints")
    if not steps:
        return -1
    NativeCheckpoint.open(step_path(path / "checkpoints", steps[-1])).verify()
    return steps[-1]


def outcome(path: Path) -> dict[str, Any]:
    """What two runs must have in common, bit for bit: the log but for times, and the tensors."""
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
    """The campaign in lines of text."""
    lines = [f"{'phase':<12}{'kills':>6}  {'longest s to end':>17}  victims"]
    for phase, row in result["by_phase"].items():
        who = ", ".join(f"{name}: {count}" for name, count in row["victims"].items())
        lines.append(f"{phase:<12}{row['kills']:>6}  {row['longest_seconds_to_end']:>17.2f}  {who}")
    lines.append(
        f"\n{result['kills']} kills over {result['runs']} runs of {result['world']} processes; "
        + (
            "every run came to its end with the losses, growths and tensors of the undisturbed "
            "run, bit for bit, and no checkpoint was lost"
            if not result["faults"]
            else "FAULTS:\n  " + "\n  ".join(result["faults"])
        )
    )
    return "\n".join(lines)


def _rank_main(
    rank: int, world: int, port: int, phases: Any, arguments: list[str], log: str
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        rank_environment(rank, world, port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    from megagrow.train.watch import Watch

    begin = Watch.begin

    def told(self: Watch, what: str, **more: Any) -> None:
        phase = _FIRST_WORDS[what.split()[0]]
        phases[rank] = (phases[rank] // 8 + 1) * 8 + phase
        begin(self, what, **more)

    Watch.begin = told  # type: ignore[method-assign]
    status = runpy.run_path(str(PRETRAIN))["main"](arguments)
    # Past the interpreter's own end, where gloo's threads may outlive what they use.
    os._exit(status)
