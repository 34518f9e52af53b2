"""Checkpoints of a run: their contents, which one to resume from, and what must match."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megagrow.checkpoint import (
    CheckpointMeta,
    NativeCheckpoint,
    Piece,
    list_steps,
    newest,
    retire,
    save,
    set_aside,
    step_path,
)
from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.config import Config
from megagrow.data.run_data import RunData
from megagrow.errors import CheckpointError, MegagrowError, TrainingError
from megagrow.state.catalog import slots_of
from megagrow.train.fingerprints import fingerprints
from megagrow.train.health.agree import on_first
from megagrow.train.health.run_lock import RunLock
from megagrow.train.state import RunState
from megagrow.transfer.execute import transfer_from_storage
from megagrow.transfer.state_map import Identity, StateMap

if TYPE_CHECKING:  # requires DeepSpeed
    from megagrow.engine.comm import Comm
    from megagrow.engine.engine import Engine

DIRECTORY = "checkpoints"
RUN = "run"  # the fingerprint that identifies a run


def is_saved(path: Path, state: RunState, *, run: str, known: Path | None) -> bool:
    """Whether a checkpoint holds this state of this run; False if there is none.

    Args:
        path: the checkpoint of the state's step, whether or not it exists.
        run: the run's id.
        known: a checkpoint known to be this run's, whatever it says: this job wrote it or started
            from it.

    Raises:
        CheckpointError: another state, or another run's, is saved there, or it is damaged.
    """
    if not path.exists():
        return False
    there = NativeCheckpoint.open(path)
    theirs = there.fingerprints.get(RUN, run)
    try:
        held = RunState.from_json(there.run_state).to_json()
    except (KeyError, TypeError, ValueError):
        held = dict(there.run_state)
    mine = state.to_json()
    passed_over = {"loss_scale"}  # known only to the engine, which updates it a little later
    if path == known:
        # A run that went back to it skips data, but has the same tensors.
        passed_over |= {"consumed_samples", "taken", "recent"}
    keys = [key for key in mine if key not in passed_over]
    differ = [key for key in keys if _plain(mine[key]) != _plain(held.get(key))]
    if theirs != run and path != known:
        found = f"that of run {theirs}"
    elif differ:
        found = ", ".join(f"{key} {held.get(key)}" for key in differ)
    else:
        return True
    raise CheckpointError(
        f"{path}: is there already, but is not the state that is to be saved",
        found=found,
        expected=f"run {run}" if theirs != run else ", ".join(f"{k} {mine[k]}" for k in differ),
        fix=f"if it is no longer needed, move it away: mv {path} {path}.old",
    )


def _plain(value: Any) -> Any:
    """A value after a round trip through JSON."""
    return json.loads(json.dumps(value))


def meta_of(
    engine: Engine, state: RunState, config: Config, data: RunData, *, run: str
) -> CheckpointMeta:
    """A checkpoint's metadata; `run` is the run's id."""
    return CheckpointMeta(
        catalog=engine.placement.catalog,
        slots=engine.slots,
        layout=engine.layout,
        config=config.model_dump(mode="json", by_alias=True),
        fingerprints={**fingerprints(data), RUN: run},
        run_state=state.to_json(),
    )


def write_run(
    *,
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    meta: CheckpointMeta,
    keep: int,
    comm: Comm,
    lock: RunLock,
    say: Callable[[str], None] = print,
) -> Path:
    """Write and commit a checkpoint, then delete all but the newest `keep`.

    On a full disk old checkpoints may be deleted first (`megagrow.checkpoint.native.retention`).

    Raises:
        CheckpointError: on all ranks; earlier checkpoints are unchanged.
        LockError: on all ranks: this job has lost run.dir, and nothing is deleted.
    """
    path = save(root, step=step, pieces=finite(pieces), meta=meta, group=comm, keep=keep, say=say)

    def tidy() -> None:
        lock.require()  # writing may have taken long
        retire(root, keep)

    on_first(comm, tidy)
    return path


def live_pieces(engine: Engine, rank: int) -> Iterator[Piece]:
    """This rank's pieces to save: views of the live state."""
    for shard in engine.placement.written_by(rank):
        for slot in slots_of(engine.placement.catalog[shard.tensor], engine.slots):
            values = engine.state.read(shard.tensor, slot.name, shard.box)
            yield Piece(shard.tensor, slot.name, shard.box, values)


def finite(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, each checked when it is asked for.

    Raises:
        TrainingError: one holds a number that is not finite.
    """
    for piece in pieces:
        if not _is_finite(piece.values):
            raise TrainingError(
                f"{piece.slot} of {piece.tensor} is not finite, so the state cannot be resumed",
                fix="resume from the last checkpoint with a lower optimizer.lr, "
                "a longer schedule.warmup, or optimizer.grad_clip of at most 1",
            )
        yield piece


def _is_finite(values: torch.Tensor) -> bool:
    # The extremes reveal every NaN and infinity, and need no memory for a mask.
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))


def candidates(root: Path, resume: str) -> list[Path]:
    """The checkpoints to resume from, best first; empty for a fresh start.

    Args:
        root: the run's directory of checkpoints.
        resume: ``auto`` (the newest if there is one), ``good`` (the newest that proves
            undamaged), ``never``, or the path of a checkpoint, of a directory of them or of a
            run (then its newest).

    Returns:
        Paths below `root` wherever they are there, however they were spelled; more than
        one only for ``good``.

    Raises:
        CheckpointError: ``never`` although there are checkpoints, no checkpoint at the path,
            or one of another run although this one has its own.
    """
    steps = list_steps(root)
    held = f"steps {', '.join(map(str, steps))}"
    if resume in ("auto", "good"):
        rising = [step_path(root, step) for step in steps]
        return rising[::-1] if resume == "good" else rising[-1:]
    if resume == "never":
        if steps:
            raise CheckpointError(
                f"{root}: --resume never, but the run directory already holds checkpoints",
                found=held,
                fix="resume with --resume auto, or start elsewhere with run.dir=NEW",
            )
        return []
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(
            f"--resume {resume}: no such checkpoint directory",
            fix=f"give one of the directories below {root}, or --resume auto",
        )
    path = newest(path / DIRECTORY) or newest(path) or path
    own = {step_path(root, step).resolve(): step_path(root, step) for step in steps}
    if steps and path.resolve() not in own:
        raise CheckpointError(
            f"--resume {resume}: not a checkpoint of this run, which already has its own",
            found=f"{held} in {root}",
            fix="start a new run from it with run.dir=NEW, or resume with --resume auto",
        )
    return [own.get(path.resolve(), path)]


def open_checkpoint(path: Path) -> NativeCheckpoint:
    """Open a checkpoint to resume from.

    Raises:
        CheckpointError: it is damaged; the error names the previous one, which is used only on
            request.
    """
    try:
        return NativeCheckpoint.open(path)
    except CheckpointError as error:
        raise _unusable(error, path) from error


def verify(path: Path) -> None:
    """Read a whole checkpoint and check its checksums.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    try:
        NativeCheckpoint.open(path).verify()
    except CheckpointError as error:
        raise _unusable(error, path) from error


def _unusable(error: MegagrowError, path: Path) -> CheckpointError:
    before = [step for step in list_steps(path.parent) if step_path(path.parent, step) < path]
    fix = (
        f"--resume {step_path(path.parent, before[-1])} resumes from the checkpoint before it, "
        "and --resume good from the newest undamaged one"
        if before
        else "there is no earlier checkpoint: start again with another run.dir"
    )
    return CheckpointError(f"{path}: cannot be resumed from\n{error}", fix=fix)


def load_run(checkpoint: NativeCheckpoint, engine: Engine, *, config: Config, comm: Comm) -> None:
    """Load the checkpoint into a fresh engine, whatever the layouts of the two.

    Raises:
        CheckpointError: on all ranks, if any found damage in what it read.
    """
    _require_slots(checkpoint, engine)
    try:
        fill_from(checkpoint, Identity(checkpoint.catalog), engine, config=config, comm=comm)
    except CheckpointError as error:
        raise _unusable(error, checkpoint.path) from error


def fill_from(
    source: CheckpointSource, state_map: StateMap, engine: Engine, *, config: Config, comm: Comm
) -> None:
    """Fill and publish an engine's state from a checkpoint of any format, through a state map.

    Raises:
        MegagrowError: on all ranks, if any found damage in what it read.
    """
    failure: Exception | None = None
    try:
        load_state(state_map, source, engine, config=config)
    except MegagrowError as error:
        failure = error
    comm.agree(failure)
    engine.publish()


def load_state(
    state_map: StateMap, source: CheckpointSource, engine: Engine, *, config: Config
) -> None:
    """Fill this rank's state from a checkpoint through a state map; does not publish it.

    Raises:
        MegagrowError: the data read is damaged.
    """
    transfer_from_storage(
        state_map=state_map,
        old=source,
        locator=source,
        new=engine.state,
        new_placement=engine.placement,
        slots=engine.slots,
        rank=engine.comm.rank,
        seed=config.run.seed,
        staging_bytes=config.growth.staging_bytes,
    )


def _require_slots(checkpoint: NativeCheckpoint, engine: Engine) -> None:
    """Require the optimizer's slots; others are ignored."""
    held = {slot.name: slot for slot in checkpoint.slots}
    lacking = (
        slot.name not in held or (slot.matrices and not held[slot.name].matrices)
        for slot in engine.slots
    )
    if any(lacking):
        stored, wanted = (
            [slot.name + ("" if slot.matrices else " (not of matrices)") for slot in x.slots]
            for x in (checkpoint, engine)
        )
        raise CheckpointError(
            "optimizer.name: the checkpoint has no state of this optimizer",
            found=", ".join(stored),
            expected=", ".join(wanted),
            fix="set optimizer.name to the run's own, or start a new run in another run.dir",
        )


__all__ = [
    "candidates",
    "load_run",
    "newest",
    "open_checkpoint",
    "set_aside",
]
