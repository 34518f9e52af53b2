"""Whole training jobs inside a test: small data, small models, `megagrow train` itself."""

import contextlib
import importlib
import io
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import yaml

import megagrow
from megagrow.data.prepare import Request, prepare
from megagrow.report.log import read_metrics
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from megagrow.engine.comm import Comm  # it imports DeepSpeed

REPOSITORY = Path(__file__).parent.parent
PRETRAIN = REPOSITORY / "launch" / "pretrain.py"

WIDTH = {"operator": "width", "factor": 2}
DEPTH = {"operator": "depth_stack", "factor": 2}


@dataclass(frozen=True)
class Outcome:
    """What one rank's `main` gave."""

    status: int
    out: str
    err: str


def make_dataset(path: Path, *, seed: int = 0, words: int = 6000) -> Path:
    """A prepared dataset of made-up text with some structure to learn."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdgkmnprst" for b in "aeiou"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(60)]
    source = path.with_suffix(".txt")
    with open(source, "w", encoding="utf-8") as stream:
        for number in range(words):
            stream.write(vocabulary[min(rng.randrange(60), rng.randrange(60))])
            stream.write("\n\n" if number % 50 == 49 else " ")
    prepare(
        Request(
            input=str(source), output=path, vocab_size=320, documents="paragraph",
            validation_fraction=0.1,
        )
    )  # fmt: skip
    return path


def settings(dataset: Path, run_dir: Path | str, **changes: Any) -> dict[str, Any]:
    """A run that grows twice in ten steps; `changes` replace keys inside sections."""
    base: dict[str, Any] = {
        "run": {"dir": str(run_dir), "seed": 5},
        "model": {
            "layers": 2, "hidden": 8, "heads": 2, "ffn": 16, "sequence": 8, "init_std": 0.2,
        },
        "layout": {"zero": 1},
        "data": {"path": str(dataset)},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup": 2, "decay": 0.2},
        "batch": {"global": 8, "micro": 2},
        "stages": stages(),
        "train": {
            "validate_every": 4, "validation_samples": 10, "log_every": 1, "tensorboard": False,
        },
        "checkpoint": {"every": 2, "keep": 3},
    }  # fmt: skip
    for section, values in changes.items():
        if isinstance(values, dict):
            base[section] = {**base.get(section, {}), **values}
        else:
            base[section] = values
    return base


def stages(
    *,
    ends: Sequence[int] = (3, 7, 10),
    policy: str = "sparkling",
    rewarm: int = 3,
    depth_policy: str = "copy",
) -> list[dict[str, Any]]:
    """Train, widen, train, deepen, train."""
    return [
        {"until": {"steps": ends[0]}},
        {"grow": {**WIDTH, "state_policy": policy, "rewarm": rewarm}, "until": {"steps": ends[1]}},
        {"grow": {**DEPTH, "state_policy": depth_policy}, "until": {"steps": ends[2]}},
    ]


def write_config(path: Path, mapping: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return path


def command(script: str) -> ModuleType:
    """The module of the command that a script of `launch/` is."""
    text = (REPOSITORY / "launch" / f"{script}.py").read_text(encoding="utf-8")
    found = re.search(r"from ((?:megagrow\.cli|benchmarks)\.\w+) import main", text)
    assert found is not None, script
    return importlib.import_module(found[1])


def main(arguments: Iterable[object]) -> Outcome:
    """Run `main` of launch/pretrain.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    status: Any
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = command("pretrain").main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return Outcome(status, out.getvalue(), err.getvalue())


def launch(
    world: int,
    *commands: Sequence[object],
    hook: tuple[Any, ...] | None = None,
    timeout: float = 120.0,
) -> list[list[Outcome]]:
    """Run commands (argument lists) one after the other in the same job of `world` ranks.

    `hook` is a module-level function and its arguments; each rank calls it with its rank first.

    Returns:
        Per command, the outcomes by rank.
    """
    by_rank = run_ranks(world, _commands, commands, hook, timeout=timeout)
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]


def _commands(
    comm: "Comm", commands: Sequence[Sequence[object]], hook: tuple[Any, ...] | None
) -> list[Outcome]:
    import megagrow.engine.comm as processes

    processes.stop = lambda: None  # one job, several commands
    if hook is not None:
        function, *arguments = hook
        function(comm.rank, *arguments)
    outcomes = []
    for number, command in enumerate(commands):
        if number:
            comm.barrier()  # as jobs are: none begins before all ranks of the last have ended
        outcomes.append(main(command))
    return outcomes


def train(
    world: int, config: Path, *overrides: object, resume: object = "auto"
) -> list[dict[str, Any]]:
    """One run that must succeed; returns the lines of its log."""
    [outcomes] = launch(world, ["--config", config, "--resume", resume, *overrides])
    assert [o.status for o in outcomes] == [0] * world, outcomes[0].err
    return log_of(config, *overrides)


def log_of(config: Path, *overrides: object) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    given = [o.partition("=")[2] for o in map(str, overrides) if o.startswith("run.dir=")]
    run_dir = given[-1] if given else yaml.safe_load(Path(config).read_text())["run"]["dir"]
    return read_metrics(Path(run_dir) / "metrics.jsonl")


def events(lines: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


TRAJECTORY = ("step", "tokens", "flops", "loss", "lr", "grad_norm", "growth_stage")


def trajectory(lines: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Everything of a run's steps that does not depend on time."""
    return [tuple(line[key] for key in TRAJECTORY) for line in events(lines, "step")]


def growths(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of its growths."""
    timeless = {
        "seconds", "time", "layout", "peak_staging_bytes", "bytes_between_ranks",
        "bytes_between_ranks_least",
    }  # fmt: skip
    return [
        {k: v for k, v in line.items() if k not in timeless} for line in events(lines, "growth")
    ]


def files_below(path: Path) -> dict[Path, bytes]:
    """Every file below a directory with its content, but for what ranks note about themselves."""
    files = {p.relative_to(path): p for p in Path(path).rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name.parts[0] != "logs"}


# --- kills --------------------------------------------------------------------------------

_PACKAGE = os.path.dirname(megagrow.__file__) + os.sep


def kill_at_call(rank: int, counts: Mapping[int, int], name: str | None = None) -> None:
    """SIGKILL this rank at its n-th call of a function of megagrow's (of that name).

    Args:
        counts: n by rank; a rank without one is left alone.
    """
    if rank not in counts:
        return
    left = counts[rank]

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(_PACKAGE)
        if ours and name in (None, code.co_name):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    threading.setprofile(watch)  # of threads to come, such as the one that saves


def killed_launch(
    world: int, command: Sequence[object], *, counts: Mapping[int, int], name: str | None = None
) -> bool:
    """Launch with kills; whether any rank was killed."""
    try:
        launch(world, command, hook=(kill_at_call, counts, name))
    except AssertionError as error:
        if not re.search(r"rank \d+ failed:\nthe process ended without a word", str(error)):
            raise
        return True
    return False
