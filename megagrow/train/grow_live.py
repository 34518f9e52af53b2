"""Live growth: the running job's engine out, the grown one in, in the same processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megagrow.config import Config
from megagrow.data.sampler import SampleIndex
from megagrow.engine.comm import Comm
from megagrow.engine.deepspeed.loss_scale import LossScale
from megagrow.engine.engine import Engine
from megagrow.forecast.cost import received
from megagrow.growth.operators.ligo import Fitted
from megagrow.growth.plan import Growth
from megagrow.state.catalog import MASTER, Slot
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.train.fit import Fit, fit_growth
from megagrow.train.run_plan import Stage
from megagrow.train.state import RunState
from megagrow.transfer.ends import Source, Target
from megagrow.transfer.execute import TransferReport, transfer_between_ranks
from megagrow.transfer.state_map import FreshStart, Identity, StateMap
from megagrow.transfer.whole_state import MemoryState


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
        fit_flops: of fitting the growth's maps, by one rank (each does the same).
        fit_samples: that the fitting took; they do not come again.
    """

    seconds: float
    bytes_moved: int
    bytes_between_ranks: int
    bytes_between_ranks_least: int
    peak_staging_bytes: int
    fit_flops: int
    fit_samples: int


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
        config=stage.settings(config),
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
    engine: Engine,
    *,
    growth: Growth | None,
    config: Config,
    stage: Stage,
    state: RunState,
    comm: Comm,
    samples: SampleIndex,
) -> tuple[Engine, GrowthReport]:
    """Carry the state of a running engine into another.

    Args:
        engine: it is closed.
        growth: what is done to the state; None changes no tensor.
        stage, state: the growth stage and the run's state that the other engine is for.
        samples: of the run, for growths that are fitted on data.
    """
    begin = time.perf_counter()
    scale = engine.loss_scale
    engine.close()
    old: _Holder = engine
    state_map: StateMap = growth or Identity(engine.placement.catalog)
    flops = fit_samples = 0
    if growth is not None and growth.fit_steps:
        old, fit = _fitted(engine, growth, config, stage, state, comm, samples)
        flops, fit_samples = fit.flops, fit.samples
        state_map = Fitted(growth.target)
    grown = start_engine(config=config, stage=stage, state=state, comm=comm, loss_scale=scale)
    report = _transfer(state_map, old, grown, config=config, comm=comm)
    grown.publish()
    seconds = max(comm.gather_floats(time.perf_counter() - begin))
    needed = received(state_map, old.placement, grown.placement, slots=grown.slots, rank=comm.rank)
    return grown, GrowthReport(
        seconds=seconds,
        bytes_moved=comm.sum_ints(report.bytes_written),
        bytes_between_ranks=comm.sum_ints(report.bytes_crossed),
        bytes_between_ranks_least=comm.sum_ints(needed.least),
        peak_staging_bytes=int(max(comm.gather_floats(report.peak_staging_bytes))),
        fit_flops=flops,
        fit_samples=fit_samples,
    )


class _Memory(Source, Target, Protocol):
    """Boxes that can be read and written."""


class _Holder(Protocol):
    """Where a state lies: in an engine, or as whole tensors on every rank."""

    @property
    def state(self) -> _Memory:
        """The boxes of this rank."""
        ...

    @property
    def placement(self) -> Placement:
        """Which those are."""
        ...

    @property
    def slots(self) -> Sequence[Slot]:
        """What it keeps of each parameter."""
        ...


@dataclass(frozen=True)
class _Whole:
    state: MemoryState
    placement: Placement
    slots: Sequence[Slot] = (MASTER,)


def _fitted(
    engine: Engine,
    growth: Growth,
    config: Config,
    stage: Stage,
    state: RunState,
    comm: Comm,
    samples: SampleIndex,
) -> tuple[_Whole, Fit]:
    """The fitted parameters of the large model, and what they took on one process."""
    small = MemoryState.empty(growth.small, (MASTER,))
    everywhere = _Whole(small, Placement(growth.small, Layout(data=comm.world)))
    identity = Identity(growth.small)
    _transfer(identity, engine, everywhere, config=config, comm=comm)
    for key, values in small.tensors.items():
        small.tensors[key] = values.to(comm.device)
    large, fit = fit_growth(
        growth,
        model=stage.model,
        small=small,
        samples=samples,
        first=state.position.split(samples.sequence)[1],
        batch=stage.plan.batch,
    )
    # Under ZeRO 1 each value has one rank to come from, should processors round differently.
    return _Whole(large, Placement(growth.target, Layout(data=comm.world, zero=1))), fit


def _transfer(
    state_map: StateMap,
    old: _Holder,
    new: _Holder,
    *,
    config: Config,
    comm: Comm,
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
