"""Recovery time: from a killed rank, or a host that falls silent, to the next training step.

Each repetition is a supervised job of its own, which saves and is then hit.  Times are read from
what any job writes: the supervisor's log (when it noticed, when the old ranks had ended), and the
run's log (the parts of the new ranks' start, the first step).  All are of one machine's clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from megagrow.cluster.supervisor import LOG
from megagrow.config import ModelConfig
from megagrow.data.prepare import Request, prepare
from megagrow.errors import TrainingError
from megagrow.models.catalog import build_catalog
from megagrow.report.log import read_metrics

FAULTS = ("rank", "host")
_SAVED = 2  # the step at whose checkpoint the fault comes
_VOCABULARY = 280
_LOOK_SECONDS = 0.05
_PATIENCE_SECONDS = 900.0
_HERE = Path(__file__).resolve().parents[1]
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
_APART = ("detection", "wait")  # set by --silence and --backoff


@dataclass(frozen=True)
class Recovery:
    """One repetition.

    Attributes:
        parts: seconds by part, in their order.
        load: when the fault came.
        save: seconds of the save before it, from the last step on, without the copy in memory.
        bytes: of that checkpoint.
        copy: bytes on rank 0's host and seconds of the copy in memory, if there was one.
    """

    parts: Mapping[str, float]
    load: float
    save: float
    bytes: int
    copy: Mapping[str, float] | None = None

    @property
    def total(self) -> float:
        """From the fault to the end of the first step."""
        return sum(self.parts.values())

    @property
    def own(self) -> float:
        """The same without what settings decide."""
        return sum(seconds for part, seconds in self.parts.items() if part not in _APART)


def measure(
    *,
    fault: str,
    parameters: float,
    repetitions: int,
    silence: float,
    backoff: float,
    directory: Path,
    copies: bool = False,
    against: Path | None = None,
) -> dict[str, Any]:
    """Hit a job of two ranks, again and again; returns JSON data.

    What is compared takes turns, so that all have the same load.

    Args:
        fault: ``rank``: SIGKILL of one; ``host``: all processes of one of two nodes are stopped, so
            that nothing is heard from it, as from one that is cut off; the other goes on alone.
        parameters: of the model, at least.
        silence: seconds after which a silent host counts as lost.
        backoff: seconds between the end of the old ranks and the start of new ones.
        directory: for the jobs, which are deleted with it.
        copies: whether to compare with jobs that have copies in memory.
        against: another checkout of megagrow, to compare with.

    Raises:
        TrainingError: a job ended, or took minutes.
    """
    model = _model(parameters)
    data = _data(directory)
    variants = {
        "own": (_HERE, False),
        **({"with_copies": (_HERE, True)} if copies else {}),
        **({"against": (against, False)} if against is not None else {}),
    }
    found: dict[str, list[Recovery]] = {name: [] for name in variants}
    for number in range(repetitions):
        for name, (checkout, in_memory) in variants.items():
            place = directory / f"{name}_{number}"
            config = _write_config(place, model, data, in_memory=in_memory)
            options = ["--silence", silence, "--backoff", backoff, "--logs", place / "logs"]
            found[name].append(_once(fault, config, options, place=place, checkout=checkout))
            seconds = found[name][-1].total
            print(f"{number + 1} of {repetitions}, {name}: {seconds:.1f} s", file=sys.stderr)
    own = found.pop("own")
    return {
        "benchmark": "recovery",
        "fault": fault,
        "parameters": build_catalog(model).parameters,
        "silence_seconds": silence,
        "backoff_seconds": backoff,
        **_rows(own),
        **{name: _rows(others) for name, others in found.items()},
    }


def _rows(found: Sequence[Recovery]) -> dict[str, Any]:
    return {
        "load_averages": [one.load for one in found],
        "parts": {part: [one.parts[part] for one in found] for part in found[0].parts},
        "total": [one.total for one in found],
        "total_without_detection_and_wait": [one.own for one in found],
        "save_seconds": [one.save for one in found],
        "bytes_on_disk": [one.bytes for one in found],
        **({"memory_copy": [one.copy for one in found]} if found[0].copy else {}),
    }


def table(result: Mapping[str, Any]) -> str:
    """Median, least and greatest seconds of each part, as Markdown."""
    loads = result["load_averages"]
    lines = [
        f"{result['fault']} lost, {result['parameters']:,} parameters, two ranks, "
        f"{len(result['total'])} repetitions, load average {min(loads):.1f} to {max(loads):.1f}",
    ]
    for name in (None, "with_copies", "against"):
        if name is not None and name not in result:
            continue
        found = result if name is None else result[name]
        rows = {
            **found["parts"],
            "**all**": found["total"],
            "**all but detection and wait**": found["total_without_detection_and_wait"],
            "(save to disk before it)": found["save_seconds"],
        }
        if "memory_copy" in found:
            rows["(copy to memory before it)"] = [x["seconds"] for x in found["memory_copy"]]
        lines += ["", *([f"{name}:", ""] if name else []), "| part | median s | least | greatest |"]
        lines.append("|---|---|---|---|")
        for part, seconds in rows.items():
            median = statistics.median(seconds)
            lines.append(f"| {part} | {median:.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")
    return "\n".join(lines)


# --- one repetition -----------------------------------------------------------------------


def _once(
    fault: str, config: Path, options: Sequence[object], *, place: Path, checkout: Path
) -> Recovery:
    log = place / "run" / "metrics.jsonl"
    with _job(fault, config, options, log=place / "output", checkout=checkout) as nodes:
        _until(log, "checkpoint", nodes, since=0.0)
        load = os.getloadavg()[0]
        # What is read again is not in this host's memory by chance.
        files = [path for path in (place / "run" / "checkpoints").rglob("*") if path.is_file()]
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = sum(path.stat().st_size for path in files)
        saving = _read(log)
        hit = time.time()
        if fault == "rank":
            _rank_of(nodes[0], 1).send_signal(signal.SIGKILL)
        else:
            for process in [nodes[1], *nodes[1].children(recursive=True)]:
                process.send_signal(signal.SIGSTOP)
        _until(log, "step", nodes[:1], since=hit, after="resume")
    saved = next(i for i, line in enumerate(saving) if line["event"] == "checkpoint")
    at = {line["event"]: line["time"] for line in saving[: saved + 1]}
    copies = [line for line in saving[:saved] if line["event"] == "memory_copy"]
    copy = {"bytes": copies[-1]["bytes"], "seconds": copies[-1]["copy_seconds"]} if copies else None
    return Recovery(
        _parts(hit, read_metrics(log), _read(place / "logs" / LOG)),
        load,
        save=at["checkpoint"] - at.get("memory_copy", at["step"]),
        bytes=size,
        copy=copy,
    )


def _parts(
    hit: float, run: Sequence[Mapping[str, Any]], supervisor: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Seconds of each part between the fault and the first step, which they add up to."""

    def first(lines: Sequence[Mapping[str, Any]], event: str, since: float) -> Mapping[str, Any]:
        return next(line for line in lines if line["event"] == event and line["time"] >= since)

    failure = first(supervisor, "failure", hit)["time"]
    ending = first(supervisor, "ending", failure)["time"]
    ended = first(supervisor, "ended", ending)["time"]
    again = first(supervisor, "attempt", ended)
    resume = first(run, "resume", hit)
    start: Mapping[str, float] = resume["start_up"]
    made = resume["time"] - sum(start.values())
    return {
        "detection": failure - hit,
        "last words of the other ranks": ending - failure,
        "teardown": ended - ending,
        "wait": again["wait"],
        "nodes meet, ranks start": made - ended - again["wait"],
        **start,
        "first step": first(run, "step", resume["time"])["time"] - resume["time"],
    }


@contextlib.contextmanager
def _job(
    fault: str, config: Path, options: Sequence[object], *, log: Path, checkout: Path
) -> Iterator[list[psutil.Process]]:
    """The supervisors of a job, one a node; they end with the block."""
    launch = checkout / "launch"
    words = [sys.executable, launch / "supervise.py", *options]
    script = [launch / "pretrain.py", "--config", config]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    environ["PYTHONPATH"] = str(checkout)
    if fault == "rank":
        commands = [[*words, "--ranks", 2, *script]]
    else:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        environ["MEGAGROW_SECRET"] = os.urandom(16).hex()
        meet = ["--nnodes", "1:2", "--ranks", 1, "--master", f"localhost:{port}"]
        commands = [[*words, *meet, "--node-rank", number, *script] for number in range(2)]
    started: list[subprocess.Popen[bytes]] = []
    # As if the nodes were hosts of their own: each has its own memory.
    memory = tempfile.TemporaryDirectory(prefix="megagrow-recovery-", dir=_MEMORY)
    try:
        with open(log, "wb") as out:
            for number, command in enumerate(commands):
                environ["MEGAGROW_MEMORY"] = str(Path(memory.name) / str(number))
                os.mkdir(environ["MEGAGROW_MEMORY"])
                started.append(
                    subprocess.Popen(
                        [str(word) for word in command],
                        env=environ,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield [psutil.Process(one.pid) for one in started]
    finally:
        for one in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(one.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            one.kill()
            one.wait()
        memory.cleanup()


def _rank_of(supervisor: psutil.Process, rank: int) -> psutil.Process:
    for process in supervisor.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process
    raise TrainingError(f"rank {rank} is not there any more")


def _until(
    log: Path,
    event: str,
    nodes: Sequence[psutil.Process],
    *,
    since: float,
    after: str | None = None,
) -> None:
    """Wait for an event in a run's log; one that follows another event, if that is given."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        lines = [line for line in _read(log) if line["time"] >= since]
        if after is not None:
            starts = [i for i, line in enumerate(lines) if line["event"] == after]
            lines = lines[starts[0] :] if starts else []
        if any(line["event"] == event for line in lines):
            return
        if time.monotonic() > end or not all(node.is_running() for node in nodes):
            raise TrainingError(f"{log}: no {event} came", fix="see the job's output beside it")
        time.sleep(_LOOK_SECONDS)


def _read(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that is being written."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]


# --- the run ------------------------------------------------------------------------------


def _model(parameters: float) -> ModelConfig:
    """A GPT-2 of at least so many parameters, with few of them in its embedding."""
    for layers in range(1, 1000):
        hidden = max(64, 64 * layers + 256)
        model = ModelConfig(
            family="gpt2", layers=layers, hidden=hidden, heads=hidden // 64, head_dim=64,
            ffn=4 * hidden, sequence=64, vocab=_VOCABULARY,
        )  # fmt: skip
        if build_catalog(model).parameters >= parameters:
            return model
    raise AssertionError(parameters)


def _data(directory: Path) -> Path:
    text = directory / "text.txt"
    text.write_text("".join(f"{n} times {n + 7} is {n * (n + 7)}.\n\n" for n in range(4000)))
    prepare(
        Request(
            input=str(text), output=directory / "data", vocab_size=_VOCABULARY,
            documents="paragraph", validation_fraction=0.1,
        )
    )  # fmt: skip
    return directory / "data"


def _write_config(place: Path, model: ModelConfig, data: Path, *, in_memory: bool) -> Path:
    place.mkdir()
    shape = ("family", "layers", "hidden", "heads", "ffn", "sequence")
    settings = {
        "run": {"dir": str(place / "run")},
        "model": {key: getattr(model, key) for key in shape},
        "layout": {"zero": 1},
        "data": {"path": str(data)},
        "batch": {"global": 4, "micro": 2},
        "stages": [{"until": {"steps": 100000}}],
        "train": {"validate_every": 100000, "validation_samples": 4, "log_every": 1,
                  "tensorboard": False},
        "checkpoint": {"every": _SAVED, "keep": 1,
                       **({"memory_every": _SAVED} if in_memory else {})},
    }  # fmt: skip
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
