"""Small instances of the commands that write, and what two runs of one must have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.training import outcome as trained
from megagrow.checkpoint.convert.registry import detect
from megagrow.config.yamltext import write_yaml
from megagrow.state.boxes import whole
from megagrow.state.catalog import slots_of


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        name: shown in tables.
        command: the `megagrow` command.
        arguments: for a run that writes under a given directory.
        outcome: reads what it wrote there, for comparison.
        world: ranks of a training job; 0 for a command without a job.
        part: only system calls on paths containing this text fail.
        faults: names of the applicable faults, with the weight of each.
    """

    name: str
    command: str
    arguments: Callable[[Path], Sequence[str]]
    outcome: Callable[[Path], Mapping[str, Any]]
    world: int = 0
    part: str = "out"
    faults: Mapping[str, int] = field(default_factory=dict)


FILES = {"SIGKILL": 10, "SIGKILL of its first process": 3, "SIGINT": 4, "ENOSPC": 6,
         "ENOSPC that stays": 4, "EIO": 6, "read-only": 4, "two at once": 4}  # fmt: skip
TRAINING = {"SIGKILL": 6, "ENOSPC": 6, "EIO": 6, "read-only": 3, "two at once": 3}
SAVINGS = {"SIGKILL": 4, "SIGKILL of its first process": 1, "SIGINT": 2, "ENOSPC": 2, "EIO": 1,
           "read-only": 1, "two at once": 1}  # fmt: skip


def commands(base: Path, config: Path) -> list[Command]:
    """All commands.

    Args:
        base: contains `text`, `data` and the runs `source` (small) and `large`.
        config: of the training run.
    """
    convert = ["--from", str(base / "large")]
    # A second job is refused at once; if it waited, it would continue with the finished run.
    training = [f"--config={config}", f"data.path={base / 'data'}", "run.wait=0"]
    return [
        *(
            Command(
                f"prepare, {workers} worker{'s' * (workers > 1)}",
                "prepare",
                lambda path, n=workers: [  # type: ignore[misc]
                    f"--input={base / 'text'}", f"--output={path / 'out'}", "--vocab-size=512",
                    "--glob=*.py", "--validation-fraction=0.1", f"--workers={n}",
                ],
                lambda path: _files(path / "out"),
                faults=FILES,
            )
            for workers in (1, 2)
        ),
        *(
            Command(
                f"convert to {fmt}, {workers} worker{'s' * (workers > 1)}",
                "convert",
                lambda path, fmt=fmt, n=workers, more=more: [  # type: ignore[misc]
                    *convert, f"--to={path / 'out'}", f"--to-format={fmt}", f"--workers={n}", *more
                ],
                lambda path: _checkpoint(path / "out"),
                faults=FILES,
            )
            for fmt, workers, more in (
                ("deepspeed", 1, ()),
                ("native", 4, ("--tensor=2", "--verify")),
            )
        ),
        Command(
            "grow",
            "grow",
            lambda path: [f"--from={base / 'large'}", f"--to={path / 'out'}", "--operator=width"],
            lambda path: _checkpoint(next((path / "out").glob("step_*"))),
            faults=FILES,
        ),
        Command(
            "train, saving in the background",
            "train",
            lambda path: [*training, f"run.dir={path / 'out'}", "checkpoint.asynchronous=true"],
            lambda path: trained(path / "out"),
            world=2,
            part="checkpoints",
            faults=TRAINING,
        ),
        Command(
            "train, log",
            "train",
            lambda path: [*training, f"run.dir={path / 'out'}"],
            lambda path: trained(path / "out"),
            world=2,
            part="metrics.jsonl",
            faults={**TRAINING, "two at once": 6},
        ),
        Command(
            "savings",
            "benchmark",
            lambda path: [
                "savings", f"--config={base / 'savings.yaml'}", "--jobs=1",
                f"--json={path / 'out.json'}", f"dir={path / 'out'}",
            ],
            lambda path: _losses(json.loads((path / "out.json").read_text())),
            faults=SAVINGS,
        ),
    ]  # fmt: skip


def write_savings(base: Path) -> None:
    """Write the configuration of the smallest savings benchmark that includes a growth."""
    settings = {
        "dir": "given",
        "target": {
            "model": {"layers": 4, "hidden": 8, "heads": 2, "ffn": 16, "sequence": 8},
            "layout": {"zero": 0}, "data": {"path": str(base / "data")},
            "schedule": {"warmup": 2}, "batch": {"global": 4, "micro": 2},
            "train": {"validate_every": 1000, "validation_samples": 8, "tensorboard": False},
            "checkpoint": {"every": 1000},
        },
        "budgets": [1.0e7, 2.0e7], "decay": 0.25,
        "sweep": {"lr": [0.001, 0.02], "budgets": [1.0e7]}, "seeds": [1],
        "curve": {"points": 0},
        "variants": {
            "stack": {
                "model": {"layers": 2},
                "stages": [{"until": {"flops": 3.0e6}}, {"grow": {"operator": "depth_stack"}}],
            }
        },
    }  # fmt: skip
    (base / "savings.yaml").write_text(write_yaml(settings), encoding="utf-8")


def _files(path: Path) -> dict[str, Any]:
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    """The names of all files and every value, with the format's checksums checked."""
    fmt, found = detect(path, None)
    source = fmt.open_source(found)
    source.verify()
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))
    values = {
        (tensor.name, slot.name): hashlib.sha256(
            source.read(tensor.name, slot.name, whole(tensor.shape)).contiguous().numpy().data
        ).hexdigest()
        for tensor in source.catalog
        for slot in slots_of(tensor, source.slots)
    }
    return {"files": names, "step": source.step, "run state": source.run_state, "values": values}


def _losses(result: Mapping[str, Any]) -> dict[str, Any]:
    """The deterministic part of a savings result: growths are charged by measured seconds."""
    return {
        "sweeps": result["sweeps"],
        "losses": [
            (run["name"], run["seed"], run["budget"], run["loss"]) for run in result["runs"]
        ],
    }
