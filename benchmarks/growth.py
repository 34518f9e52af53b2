"""Measure live growth: time, bytes and memory, compared with a plain copy of the new state."""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import STEPS_BEFORE, Case, config_for
from benchmarks.memory import PeakMemory, copy_seconds, resident_bytes, tensor_bytes
from megagrow.checkpoint import CheckpointMeta, NativeCheckpoint, save
from megagrow.config import Config, ModelConfig
from megagrow.engine.comm import Comm
from megagrow.engine.engine import Engine
from megagrow.engine.state import LiveState
from megagrow.forecast.cost import STATE_BYTES
from megagrow.state.catalog import ADAM_SLOTS, MASTER
from megagrow.state.placement import Placement
from megagrow.train.checkpoints import live_pieces, load_state
from megagrow.train.grow_live import fill_fresh, grow, start_engine
from megagrow.train.run_plan import Stage, plan_run
from megagrow.train.state import RunState
from megagrow.transfer.execute import TransferReport

_COPY_ROUNDS = 3


class _Clock:
    """Seconds of the phases of a collective operation, on the slowest rank."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._comm.barrier()
        begin = time.perf_counter()
        yield
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        self.seconds[part] = max(self._comm.gather_floats(time.perf_counter() - begin))


def measure(
    comm: Comm, case: Case, model: ModelConfig, staging_mib: float, scratch: str | None
) -> dict[str, Any]:
    """Grow one engine into another and measure it; all ranks call together.

    Args:
        comm: the processes.
        case: the growth.
        model: the small model.
        staging_mib: staging memory of the transfer, in MiB.
        scratch: directory for the checkpoint that the growth is compared with; None skips the
            comparison.
    """
    config = config_for(case, model, world=comm.world, staging_mib=staging_mib)
    before, after = plan_run(config, world=comm.world, vocabulary=None).stages
    growth = after.growth
    assert growth is not None
    state = RunState(optimizer_step=STEPS_BEFORE)
    small = start_engine(config=config, stage=before, state=state, comm=comm)
    fill_fresh(small, config=config, comm=comm)
    _make_moments(small.state, small.placement, comm.rank)
    state = state.after_growth(growth, betas=config.optimizer.bias_correction)
    old_placement, new_placement = small.placement, after.placement(state.rules)
    new_bytes = _held(new_placement, comm.rank)
    clock = _Clock(comm)
    copies: list[float] = []

    def copy_for_comparison() -> None:
        for _ in range(_COPY_ROUNDS):
            comm.barrier()
            copies.append(max(comm.gather_floats(copy_seconds(new_bytes, device=comm.device))))

    with contextlib.ExitStack() as held:
        checkpoint = None
        if scratch is not None:
            directory = _scratch(comm, scratch, held)
            with clock("save"):
                checkpoint = _save(small, config, directory, comm)
        copy_for_comparison()
        engine, report, memory = _grow_live(
            small, config=config, stage=after, state=state, comm=comm, clock=clock
        )
        del small
        gc.collect()
        copy_for_comparison()
        same = None
        if checkpoint is not None:
            live = _checksum(engine.state, new_placement, comm.rank)
            with clock("load"):
                load_state(growth, NativeCheckpoint.open(checkpoint), engine, config=config)
                engine.publish()
            differs = live != _checksum(engine.state, new_placement, comm.rank)
            same = not any(comm.all_gather(differs))

    ranks = comm.all_gather(
        {
            "old_state_bytes": _held(old_placement, comm.rank),
            "new_state_bytes": new_bytes,
            **memory,
            "local_bytes": report.bytes_written - report.bytes_received,
            "foreign_bytes": report.bytes_received,
            "crossed_bytes": report.bytes_crossed,
            "least_bytes": report.bytes_least,
            "staging_bytes": report.peak_staging_bytes,
        }
    )
    return {
        "case": str(case),
        "old_layout": case.old.model_dump(),
        "new_layout": case.new.model_dump(),
        "operator": case.operator,
        "factor": case.factor,
        "policy": growth.policy.name,
        "model": after.model.model_dump(by_alias=True),
        "parameters": new_placement.catalog.parameters,
        "world": comm.world,
        "threads": torch.get_num_threads(),
        "device": str(comm.device),
        "staging_mib": staging_mib,
        "seconds": {**clock.seconds, "copy": statistics.median(copies)},
        "copies": copies,
        "files_give_the_same": same,
        "ranks": ranks,
    }


def _grow_live(
    small: Engine, *, config: Config, stage: Stage, state: RunState, comm: Comm, clock: _Clock
) -> tuple[Engine, TransferReport, dict[str, Any]]:
    """Grow as a run does, while measuring time and memory."""
    gc.collect()
    besides = resident_bytes() - tensor_bytes()
    peaks: dict[str, PeakMemory] = {}
    settled = 0

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        nonlocal settled
        with PeakMemory() as peaks[name], clock(name):
            yield
        if name == "transfer":
            settled = resident_bytes()

    engine, report = grow(
        small, growth=stage.growth, config=config, stage=stage, state=state, comm=comm, phase=phase
    )
    tensors = tensor_bytes()
    building = max(peaks["close"].bytes, peaks["start"].bytes)
    memory = {
        # Old state, new state, and the new engine's other tensors: the unavoidable minimum.
        "tensor_bytes": tensors,
        "transfer_above_bytes": peaks["transfer"].bytes - settled,
        "start_above_bytes": building - besides - tensors,
        "publish_above_bytes": peaks["publish"].bytes - besides - tensors,
        "peak_is_exact": all(peak.exact for peak in peaks.values()),
    }
    return engine, report.mine, memory


def _scratch(comm: Comm, parent: str, held: contextlib.ExitStack) -> Path:
    """A directory for all ranks, removed at the end."""
    mine = None
    if comm.rank == 0:
        mine = held.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix="growth-"))
    return Path(comm.broadcast(mine))


def _held(placement: Placement, rank: int) -> int:
    """Bytes of parameters and optimizer state that a rank holds."""
    volume = sum(shard.box.volume for shard in placement.shards(rank))
    return volume * STATE_BYTES * len(ADAM_SLOTS)


def _make_moments(state: LiveState, placement: Placement, rank: int) -> None:
    """Fill the moments as after some steps: a transfer of zeros would prove nothing."""
    for shard in placement.shards(rank):
        for slot in ADAM_SLOTS[1:]:
            memory = state.view(shard.tensor, slot.name, shard.box)
            torch.mul(state.view(shard.tensor, MASTER.name, shard.box), 0.5, out=memory)


def _save(engine: Engine, config: Config, root: Path, comm: Comm) -> Path:
    meta = CheckpointMeta(
        catalog=engine.placement.catalog,
        slots=engine.slots,
        layout=engine.layout,
        config=config.model_dump(mode="json", by_alias=True),
        fingerprints={},
        run_state={},
    )
    return save(root, step=0, pieces=live_pieces(engine, comm.rank), meta=meta, group=comm)


def _checksum(state: LiveState, placement: Placement, rank: int) -> int:
    """A number that almost certainly changes if any bit of the rank's state changes."""
    total = 0
    for shard in placement.shards(rank):
        for slot in ADAM_SLOTS:
            values = state.read(shard.tensor, slot.name, shard.box).contiguous()
            total = zlib.adler32(values.cpu().numpy().tobytes(), total)
    return total
