"""Live growth: the running job's engine out, the grown one in, in the same processes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megagrow.config import Config
from megagrow.engine.comm import Comm
from megagrow.engine.engine import Engine
from megagrow.engine.loss_scale import LossScale
from megagrow.schedule.cost import received
from megagrow.state.statemap import FreshStart, Identity, StateMap
from megagrow.state.transfer import TransferReport, transfer_between_ranks
from megagrow.train.plan import Stage
from megagrow.train.state import RunState


@dataclass(frozen=True)
class GrowthReport:
    """What a growth cost, over all ranks.

    Attributes:
        seconds: from the old engine's end to the new one's readiness, the slowest rank.
        bytes_moved: bytes of new state that were copied from old state.
        bytes_between_ranks: what travelled from one rank to another for them; a value that
            lands on a rank several times travels once.
        bytes_between_ranks_least: what must: every value that a rank needs and does not hold,
            once.
        peak_staging_bytes: the largest staging memory of any rank.
    """

    seconds: float
    bytes_moved: int
    bytes_between_ranks: int
    bytes_between_ranks_least: int
    peak_staging_bytes: int


def start_engine(
    *,
    config: Config,
    stage: Stage,
    state: RunState,
    comm: Comm,
    loss_scale: LossScale | None = None,
) -> Engine:
    """The engine of a growth stage, its state not yet written."""
    engine = Engine(
        config=config,
        model=stage.model,
        spread=stage.plan.layout,
        placement=stage.placement(state.rules),
        rules=state.rules,
        optimizer_step=state.optimizer_step,
        ramp=state.ramp,
        loss_scale=loss_scale,
        comm=comm,
    )
    if state.ramp is not None:
        engine.set_progress(state.ramp.progress(state.step))
    return engine


def fill_fresh(engine: Engine, *, config: Config, comm: Comm) -> None:
    """Give a run's first engine its initial state."""
    _transfer(FreshStart(engine.placement.catalog), engine, engine, config=config, comm=comm)
    engine.publish()


def grow(
    engine: Engine, *, config: Config, stage: Stage, state: RunState, comm: Comm
) -> tuple[Engine, GrowthReport]:
    """Carry the state of a running engine into the next growth stage's.

    Args:
        engine: of the stage before; it is closed.
        stage: the next stage; without a growth only the layout changes.
        state: the run's state after the growth.
    """
    return rebuild(engine, stage.growth, config=config, stage=stage, state=state, comm=comm)


def rebuild(
    engine: Engine,
    growth: StateMap | None,
    *,
    config: Config,
    stage: Stage,
    state: RunState,
    comm: Comm,
) -> tuple[Engine, GrowthReport]:
    """Take an engine down, and up again as `stage` and `state` say; None changes no tensor."""
    begin = time.perf_counter()
    scale = engine.loss_scale
    engine.close()
    grown = start_engine(config=config, stage=stage, state=state, comm=comm, loss_scale=scale)
    state_map = growth or Identity(grown.placement.catalog)
    report = _transfer(state_map, engine, grown, config=config, comm=comm)
    grown.publish()
    seconds = max(comm.gather_floats(time.perf_counter() - begin))
    needed = received(
        state_map, engine.placement, grown.placement, slots=grown.slots, rank=comm.rank
    )
    return grown, GrowthReport(
        seconds=seconds,
        bytes_moved=comm.sum_ints(report.bytes_written),
        bytes_between_ranks=comm.sum_ints(report.bytes_crossed),
        bytes_between_ranks_least=comm.sum_ints(needed.least),
        peak_staging_bytes=int(max(comm.gather_floats(report.peak_staging_bytes))),
    )


def _transfer(
    state_map: StateMap, old: Engine, new: Engine, *, config: Config, comm: Comm
) -> TransferReport:
    return transfer_between_ranks(
        state_map=state_map,
        old=old.state,
        old_placement=old.placement,
        new=new.state,
        new_placement=new.placement,
        slots=new.slots,
        channel=comm,
        seed=config.run.seed,
        staging_bytes=int(config.growth.staging_mib * 2**20),
        device=comm.device,
    )
