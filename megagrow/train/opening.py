"""What can be checked before the processes join: errors, or that the run is already finished.

It needs neither DeepSpeed, which is slow to import, nor other ranks: each rank checks for itself,
on the same files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megagrow.checkpoint import list_steps, step_path
from megagrow.checkpoint.native.retention import size_of, superseded
from megagrow.config import Config
from megagrow.data.run_data import RunData
from megagrow.errors import CheckpointError, TrainingError
from megagrow.files import is_url
from megagrow.forecast.cost import STATE_BYTES
from megagrow.report.log import last_line, read_lines, tail_start
from megagrow.report.units import human
from megagrow.state.catalog import ADAM_SLOTS, slots_of
from megagrow.train import checkpoints
from megagrow.train.agreement import check_agreement
from megagrow.train.init_from import plan_start
from megagrow.train.logging.metrics import FILE_NAME
from megagrow.train.run_plan import RunPlan, plan_run
from megagrow.train.state import RunState

_READ_AGAIN = 4 << 30  # bytes of a last checkpoint up to which a finished run verifies it again


def look_ahead(
    config: Config, *, plan: RunPlan, data: RunData, world: int, resume: str
) -> str | None:
    """Check that a run can start here, as far as one process alone can tell.

    Args:
        world: number of processes.
        resume: as for `Trainer`.

    Returns:
        If the run has nothing left to do, a text that says so; else None.

    Raises:
        MegagrowError: an error that the run would hit later.
    """
    run_dir = Path(config.run.dir)
    root = run_dir / checkpoints.DIRECTORY
    if is_url(resume):
        require_disk(config, plan)
        return None  # rank 0 downloads it once the ranks have joined
    paths = checkpoints.candidates(root, resume)
    if not paths:
        if config.init is not None:
            plan_start(config, plan, data)
        require_disk(config, plan)
        return None
    path, state, changes = _first_that_opens(paths, config, plan, data)
    plan = plan_run(config, world=world, vocabulary=data.vocab_size, ends=state.ends)
    if path.parent != root:
        require_disk(config, plan)
        return None
    _require_log(run_dir / FILE_NAME, state)
    # A store that is new to the run lacks its checkpoints until it is started once more.
    new_store = any(line.startswith("checkpoint.remote:") for line in changes)
    if path == checkpoints.newest(root) and not new_store:
        text = None
        try:
            text = _finished(config, plan, state, path)
        except CheckpointError:
            if resume != "good":
                raise  # otherwise the previous one may do
        if text is not None:
            return "\n".join([*(f"changed since then: {line}" for line in changes), text])
    require_disk(config, plan)
    return None


def checkpoint_bytes(plan: RunPlan) -> int:
    """Size of the largest checkpoint that a run will write."""
    return STATE_BYTES * max(
        sum(tensor.volume * len(slots_of(tensor, ADAM_SLOTS)) for tensor in stage.catalog)
        for stage in plan.stages
    )


def copies_in_words(plan: RunPlan, *, every: int, ranks: int) -> str:
    """What copies in memory take of a host, in the run's largest stage.

    Args:
        every: `checkpoint.memory_every`.
        ranks: on a host, at most.
    """
    world = plan.stages[0].layout.world
    ranks = min(ranks, world)
    hosts = -(-world // ranks)
    held = checkpoint_bytes(plan) * ranks * min(hosts, 2) // world
    return (
        f"copies in memory: every {every} steps; {human(held, 'B')} on each host, "
        f"{human(2 * held, 'B')} during a copy, with {ranks} ranks on a host"
        + ("" if hosts > 1 else "; there is only one host: if it is lost, so are the copies")
        + "; a start takes the newer of run.dir and memory"
    )


def require_disk(config: Config, plan: RunPlan) -> None:
    """Reject a disk that cannot hold one more checkpoint of the run.

    What the save would delete for it counts as free space.
    """
    run_dir = Path(config.run.dir)
    usage = shutil.disk_usage(existing(run_dir))
    needed = checkpoint_bytes(plan)
    if usage.free >= needed or usage.total == 0:  # some network file systems report no size
        return
    held = run_dir / checkpoints.DIRECTORY
    old = superseded(held, max(config.checkpoint.keep - 1, 1))
    if usage.free + sum(map(size_of, old)) >= needed:
        return
    steps = [step_path(held, step) for step in list_steps(held)]
    sizes = ", ".join(f"{path.name} ({human(size_of(path), 'B')})" for path in steps)
    raise TrainingError(
        f"run.dir = {run_dir}: too little space on its disk",
        found=f"{human(usage.free, 'B')} free" + (f"; checkpoints {sizes}" if sizes else ""),
        expected=f"{human(needed, 'B')}, the size of the largest checkpoint of this run",
        fix="free space"
        + (", or lower checkpoint.keep to let older checkpoints go" if len(steps) > 1 else "")
        + ", or set run.dir to a larger disk",
    )


def existing(path: Path) -> Path:
    """A path, or its nearest existing parent."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def _first_that_opens(
    paths: list[Path], config: Config, plan: RunPlan, data: RunData
) -> tuple[Path, RunState, list[str]]:
    """The checkpoint that the run will resume from, its state, and what has changed since."""
    for number, path in enumerate(paths, start=1):
        try:
            checkpoint = checkpoints.open_checkpoint(path)
            state, changes = check_agreement(checkpoint, config=config, data=data, plan=plan)
            return path, state, changes
        except CheckpointError:
            if number == len(paths):
                raise
    raise AssertionError("at least one path is given")


def _require_log(log: Path, state: RunState) -> None:
    """Check that the part of the log that a resume will read is intact."""
    if log.exists():
        start = tail_start(log, step=state.step, stage=state.growth_stage)
        for _ in read_lines(log, start=start):
            pass


def _finished(config: Config, plan: RunPlan, state: RunState, path: Path) -> str | None:
    stop = config.train.stop_after_steps
    end = plan.total_steps if stop is None else min(stop, plan.total_steps)
    run_dir = Path(config.run.dir)
    log, report = run_dir / FILE_NAME, run_dir / "report.html"
    if state.step < end or not log.exists():
        return None
    said = last_line(log)
    # Without an `end` event the previous job was killed, and the run now ends properly.
    if said is None or said["event"] != "end" or said.get("step") != state.step:
        return None
    at = f"step {state.step:,} of {plan.total_steps:,}"
    if state.step >= plan.total_steps:
        what = f"{run_dir} is finished: {at}"
        more = f"raise stages.{len(plan.stages) - 1}.until"
    else:
        what = f"{run_dir} is where train.stop_after_steps = {stop} ends it: {at}"
        more = "raise train.stop_after_steps"
    small = size_of(path) <= _READ_AGAIN
    if small:
        checkpoints.verify(path)
    read = "every checksum compared" if small else f"not read: launch/inspect.py {path} --verify"
    shown = report if report.exists() else f"made by python launch/report.py {run_dir}"
    return (
        f"{what}; nothing is left to train\n  to train on: {more}, or start another run with "
        f"run.dir=NEW\n  checkpoint: {path} ({read})\n  report: {shown}"
    )
