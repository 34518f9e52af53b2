"""Faults of jobs on two hosts made of namespaces: every run must end as the undisturbed one does.

A supervised job of a rank on each host trains a small run that grows.  After a drawn number of
steps a drawn fault comes; what ended is started again, as a scheduler or a person would, and the
run goes on.  When it is finished, its losses, growths, validations, run state and tensors must be
those of the undisturbed run, bit for bit.  Every other run has copies in the memory of its hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.hosts import Hosts
from benchmarks.faults.training import newest, outcome
from megagrow.config.yamltext import write_yaml
from megagrow.data.prepare import Request, prepare
from megagrow.errors import CheckpointError

KINDS = {
    "SIGKILL of a rank": 3,
    "SIGKILL of all ranks of a host": 2,
    "SIGKILL of a node's supervisor": 1,
    "SIGKILL of the supervisor that decides": 1,
    "SIGSTOP of a rank": 1,
    "cable cut, and plugged in again": 2,
    "SIGTERM of all supervisors": 1,
    "SIGINT of all supervisors": 1,
}  # with the weight of each
_GAP = (3, 40)  # steps between a start and the fault
_PATIENCE = 600.0  # seconds for anything
_LOOK = 0.02
_CHECKOUT = Path(__file__).resolve().parents[2]
_OPTIONS = ("--nnodes", "2", "--ranks", "1", "--silence", "10", "--grace", "5", "--backoff", "0.5",
            "--restarts", "99")  # fmt: skip
_DECIDES, _OTHER = "h0", "h1"
_SCRIPT = "supervise.py"


@dataclass(frozen=True)
class Fault:
    """One fault and its outcome.

    Attributes:
        kind: one of `KINDS`.
        step: the last in the log when it came.
        copies: whether the run has copies in memory.
        seconds: until the next step of the restarted job.
        again: the step that it went on from.
        memory: whether that was a copy in memory.
    """

    kind: str
    step: int
    copies: bool
    seconds: float
    again: int
    memory: bool


class TwoHosts:
    """A campaign.

    Args:
        directory: for data and runs, on a disk that the hosts share; it must be empty.
        seed: of what is drawn.
        earlier: the result of an earlier campaign, which this one adds to.
    """

    def __init__(
        self, directory: Path, *, seed: int, earlier: Mapping[str, Any] | None = None
    ) -> None:
        before = earlier or {"every_fault": [], "runs": 0, "differences": []}
        self.faults = [Fault(**one) for one in before["every_fault"]]
        self._of_this_run: list[Fault] = []  # they count once its outcome is compared
        self.runs = int(before["runs"])
        self.differences: list[str] = list(before["differences"])
        self._directory, self._draw = directory, random.Random(seed + len(self.faults))
        self._jobs: dict[str, subprocess.Popen[str]] = {}
        self._port = 20_000 + self._draw.randrange(5000)

    def run(self, wanted: int, *, minutes: float) -> None:
        """Let faults happen until there are this many, or the time is up.

        Raises:
            CheckpointError: a job did not go on, or the undisturbed one failed.
        """
        end = time.monotonic() + 60 * minutes
        source = Path(json.__file__).parent  # text that exists on every machine
        prepare(
            Request(input=str(source), output=self._directory / "data", vocab_size=512,
                    glob="*.py", validation_fraction=0.1)
        )  # fmt: skip
        (self._directory / "hosts").mkdir()
        with Hosts(self._directory / "hosts", 2) as self._hosts:
            straight = self._whole_run("undisturbed", faults=lambda: False, copies=False)
            while len(self.faults) < wanted and time.monotonic() < end:
                name = f"run_{self.runs}"
                path = self._whole_run(
                    name,
                    faults=lambda: (
                        len(self.faults) + len(self._of_this_run) < wanted
                        and time.monotonic() < end
                    ),
                    copies=self.runs % 2 == 0,
                )
                found, expected = outcome(path), outcome(straight)
                self.differences += [
                    f"{name}: {what} differ from the undisturbed run's"
                    for what in expected
                    if found.get(what) != expected[what]
                ]
                self.runs += 1
                self.faults += self._of_this_run
                self._of_this_run = []
                shutil.rmtree(path)

    def result(self) -> dict[str, Any]:
        """All results, for JSON."""
        kinds = {kind: [one for one in self.faults if one.kind == kind] for kind in KINDS}
        return {
            "benchmark": "two_hosts",
            "faults": len(self.faults),
            "runs": self.runs,
            "differences": self.differences,
            "by_kind": {
                kind: {
                    "faults": len(found),
                    "resumed_from_memory": sum(one.memory for one in found),
                    "longest_seconds_to_next_step": max((one.seconds for one in found), default=0),
                }
                for kind, found in kinds.items()
            },
            "every_fault": [asdict(one) for one in self.faults],
        }

    # --- a run ----------------------------------------------------------------------------

    def _whole_run(self, name: str, *, faults: Callable[[], bool], copies: bool) -> Path:
        """A run from its start to its end, with faults as long as they are wanted."""
        path = self._directory / name
        self._log = path / "metrics.jsonl"
        config = self._directory / f"{name}.yaml"
        config.write_text(write_yaml(self._settings(path, copies=copies)), encoding="utf-8")
        self._command = [
            sys.executable, _CHECKOUT / "launch" / _SCRIPT, *_OPTIONS,
            "--master", f"{_DECIDES}:{self._port}", _CHECKOUT / "launch" / "pretrain.py",
            "--config", config,
        ]  # fmt: skip
        self._output = self._directory / f"{name}.out"
        try:
            self._start()
            since = 0.0
            while True:
                over = self._wait(partial(self._trains, since, self._draw.randint(*_GAP)), "steps")
                if over or not faults():
                    self._wait(lambda: False, "the end of the run")
                    break
                since = self._one_fault(copies=copies)
        finally:
            self._end()
        if newest(path) < 0:
            raise CheckpointError(f"{path}: the run saved nothing", fix=f"see {self._output}")
        return path

    def _one_fault(self, *, copies: bool) -> float:
        """Let a fault happen, and wait for the next step; returns when that was started."""
        [kind] = self._draw.choices(list(KINDS), list(KINDS.values()))
        steps = [line["step"] for line in self._lines() if line["event"] == "step"]
        hit = time.time()
        self._strike(kind)
        over = self._wait(lambda: self._steps_since(hit) > 0, f"step after a {kind}")
        lines = [line for line in self._lines() if line["time"] >= hit]
        resumes = [line for line in lines if line["event"] == "resume"]
        if over and not resumes:  # the run ended before the fault came
            return hit
        after = lines.index(resumes[0])
        first = next((line for line in lines[after:] if line["event"] == "step"), resumes[0])
        one = Fault(
            kind=kind,
            step=steps[-1],
            copies=copies,
            seconds=round(first["time"] - hit, 2),
            again=resumes[0]["step"],
            memory=bool(resumes[0].get("memory")),
        )
        self._of_this_run.append(one)
        count = len(self.faults) + len(self._of_this_run)
        where = f"from {one.again}{' in memory' * one.memory}"
        print(f"{count}: {kind}, step {one.step}, {where}, {one.seconds:.0f} s", file=sys.stderr)
        return float(resumes[0]["time"])

    def _strike(self, kind: str) -> None:
        ranks = self._hosts.ranks()
        host = self._draw.choice([_DECIDES, _OTHER])
        here = [pid for pid, name in ranks.values() if name == host]
        if kind == "SIGKILL of a rank":
            _send(signal.SIGKILL, here[:1])
        elif kind == "SIGKILL of all ranks of a host":
            _send(signal.SIGKILL, here)
        elif kind == "SIGSTOP of a rank":
            _send(signal.SIGSTOP, here[:1])
        elif kind == "SIGKILL of a node's supervisor":
            _send(signal.SIGKILL, self._supervisor(_OTHER))
        elif kind == "SIGKILL of the supervisor that decides":
            _send(signal.SIGKILL, self._supervisor(_DECIDES))
        elif kind == "cable cut, and plugged in again":
            self._hosts.cut(_OTHER)
            self._until(lambda: self._jobs[_OTHER].poll() is not None, "end on the host cut off")
            self._hosts.heal(_OTHER)
        else:
            number = signal.SIGTERM if kind.startswith("SIGTERM") else signal.SIGINT
            _send(number, self._supervisor(_DECIDES) + self._supervisor(_OTHER))

    # --- the job --------------------------------------------------------------------------

    def _start(self, *names: str) -> None:
        for name in names or (_DECIDES, _OTHER):
            number = ["--node-rank", str(int(name != _DECIDES))]
            at = self._command.index(_CHECKOUT / "launch" / "pretrain.py")
            with self._output.open("a") as out:
                self._jobs[name] = self._hosts.start(
                    name, [*self._command[:at], *number, *self._command[at:]],
                    stdout=out, stderr=subprocess.STDOUT,
                    environ={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                             "MEGAGROW_SECRET": "0123456789abcdef", "PYTHONPATH": _CHECKOUT},
                )  # fmt: skip

    def _wait(self, good: Callable[[], bool], what: str) -> bool:
        """Wait, and start again what has ended; True if the run came to its end."""
        end = time.monotonic() + _PATIENCE
        while not good():
            ended = {name: job.poll() for name, job in self._jobs.items()}
            if set(ended.values()) == {0}:
                return True
            if ended[_DECIDES] is not None:  # the job is over: all nodes begin anew
                self._until(lambda: self._jobs[_OTHER].poll() is not None, "end of the other node")
                if {job.returncode for job in self._jobs.values()} != {0}:
                    self._start()
            elif ended[_OTHER] is not None and not self._finished():
                self._start(_OTHER)
            if time.monotonic() > end:
                raise CheckpointError(f"no {what} came", fix=f"see {self._output}")
            time.sleep(_LOOK)
        return False

    def _until(self, good: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _PATIENCE
        while not good():
            if time.monotonic() > end:
                raise CheckpointError(f"no {what} came", fix=f"see {self._output}")
            time.sleep(_LOOK)

    def _end(self) -> None:
        for name, job in self._jobs.items():
            self._hosts.heal(name)
            _send(signal.SIGKILL, self._supervisor(name))
            _send(signal.SIGKILL, list(self._hosts.processes(name, "pretrain.py")))
            job.kill()
            job.wait()

    def _supervisor(self, name: str) -> list[int]:
        return list(self._hosts.processes(name, _SCRIPT))

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines of the run's log, which is being written."""
        if not self._log.exists():
            return []
        return [json.loads(line) for line in self._log.read_bytes().split(b"\n")[:-1]]

    def _steps_since(self, moment: float) -> int:
        """Steps after the first start since then."""
        lines = [line for line in self._lines() if line["time"] >= moment]
        starts = [i for i, x in enumerate(lines) if x["event"] in ("run_start", "resume")]
        return sum(x["event"] == "step" for x in lines[starts[0] :]) if starts else 0

    def _trains(self, since: float, steps: int) -> bool:
        return self._steps_since(since) >= steps

    def _finished(self) -> bool:
        return any(line["event"] == "end" for line in self._lines()[-1:])

    def _settings(self, path: Path, *, copies: bool) -> dict[str, Any]:
        return {
            "run": {"dir": str(path), "seed": 5},
            "model": {"layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "sequence": 16,
                      "init_std": 0.2},
            "layout": {"zero": 1},
            "data": {"path": str(self._directory / "data")},
            "optimizer": {"lr": 0.01},
            "schedule": {"warmup": 2, "decay": 0.2},
            "batch": {"global": 8, "micro": 2},
            "stages": [
                {"until": {"steps": 80}},
                {"grow": {"operator": "width", "factor": 2, "rewarm": 5}, "layout": {"zero": 2},
                 "until": {"steps": 160}},
                {"grow": {"operator": "depth_stack", "factor": 2},
                 "layout": {"tensor": 2, "zero": 0}, "until": {"steps": 240}},
            ],
            "train": {"validate_every": 20, "validation_samples": 8, "log_every": 10,
                      "tensorboard": False, "threads": 1},
            "checkpoint": {"every": 10, "keep": 3, **({"memory_every": 3} if copies else {})},
            "watch": {"stall": 30, "slow": 120},
        }  # fmt: skip


def _send(number: signal.Signals, processes: Sequence[int]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def table(result: Mapping[str, Any]) -> str:
    """The campaign as lines of text."""
    lines = [f"{'fault':<42}{'number':>7}{'from memory':>13}{'longest s to the next step':>28}"]
    for kind, row in result["by_kind"].items():
        lines.append(
            f"{kind:<42}{row['faults']:>7}{row['resumed_from_memory']:>13}"
            f"{row['longest_seconds_to_next_step']:>28.1f}"
        )
    count = Counter(one["copies"] for one in result["every_fault"])
    lines.append(
        f"\n{result['faults']} faults ({count[True]} of runs with copies in memory) over "
        f"{result['runs']} runs on two hosts; "
        + (
            "every run ended with the losses, growths and tensors of the undisturbed one, bit for "
            "bit"
            if not result["differences"]
            else "DIFFERENCES:\n  " + "\n  ".join(result["differences"])
        )
    )
    return "\n".join(lines)
