"""Live growth: replace the running engine by the grown one, in the same processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from megagrow.config import Config
from megagrow.data.run_data import Samples
from megagrow.engine.comm import Comm
from megagrow.engine.deepspeed.loss_scale import LossScale
from megagrow.engine.engine import Engine
from megagrow.growth.operators.ligo import Fitted
from megagrow.growth.plan import Growth
from megagrow.state.catalog import MASTER, Slot
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.train.fit import GrowthFit, fit_growth
from megagrow.train.run_plan import Stage
from megagrow.train.state import RunState
from megagrow.transfer.ends import Source, Target
from megagrow.transfer.execute import TransferReport, transfer_between_ranks
from megagrow.transfer.state_map import FreshStart, Identity, StateMap
from megagrow.transfer.whole_state import MemoryState


@dataclass(frozen=True)
class GrowthReport:
    """The cost of a growth, over all ranks.

    Attributes:
        seconds: from closing the old engine until the new one is ready, on the slowest rank.
        bytes_moved: bytes of new state copied from old state.
        bytes_between_ranks: bytes sent between ranks for that; a value that a rank uses
            several times is sent once.
        bytes_between_ranks_least: the minimum: every value that a rank needs and does not hold,
            once.
        peak_staging_bytes: the largest staging memory of any rank.
        fit_flops: FLOPs of fitting the growth's maps, on one rank (each does the same).
        fit_samples: number of samples that the fit consumed.
        mine: this rank's part of the transfer.
    """

    seconds: float
    bytes_moved: int
    bytes_between_ranks: int
    bytes_between_ranks_least: int
    peak_staging_bytes: int
    fit_flops: int
    fit_samples: int
    mine: TransferReport

    def of_all_ranks(self) -> dict[str, Any]:
        """The report without this rank's own numbers."""
        return {key: value for key, value in vars(self).items() if key != "mine"}


def start_engine(
    *,
    config: Config,
    stage: Stage,
    state: RunState,
    comm: Comm,
    loss_scale: LossScale | None = None,
    eod: int | None = None,
) -> Engine:
    """The engine of a growth stage, with its state not yet filled (see `Engine`)."""
    engine = Engine(
        config=stage.settings(config),
        model=stage.model,
        spread=stage.plan.layout,
        placement=stage.placement(state.rules),
        rules=state.rules,
        optimizer_step=state.optimizer_step,
        eod=eod,
        ramp=state.ramp,
        loss_scale=loss_scale,
        comm=comm,
    )
    if state.ramp is not None:
        engine.set_progress(state.ramp.progress(state.step))
    return engine


def fill_fresh(engine: Engine, *, config: Config, comm: Comm) -> None:
    """Initialise the state of a run's first engine."""
    placement = engine.placement
    _transfer(
        FreshStart(placement.catalog), engine.state, placement, engine, config=config, comm=comm
    )
    engine.publish()


Phase = Callable[[str], AbstractContextManager[None]]


def _unwatched(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


def grow(
    engine: Engine,
    *,
    growth: Growth | None,
    config: Config,
    stage: Stage,
    state: RunState,
    comm: Comm,
    samples: Samples | None = None,
    eod: int | None = None,
    phase: Phase = _unwatched,
) -> tuple[Engine, GrowthReport]:
    """Transfer the state of a running engine into a new one.

    Args:
        engine: the old engine; it is closed.
        growth: the growth to apply; None changes no parameter.
        stage, state: the growth stage and the run state of the new engine.
        samples: the run's, for growths that are fitted on data.
        eod: of the new engine.
        phase: a context entered for each part, by name: ``close``, ``start``, ``transfer``,
            ``publish``.
    """
    begin = time.perf_counter()
    scale, placement = engine.loss_scale, engine.placement
    with phase("close"):
        old: Source = engine.close()
    state_map: StateMap = growth or Identity(stage.catalog, placement.catalog)
    flops = fit_samples = 0
    if growth is not None and growth.fit_steps:
        assert samples is not None, "a growth that is fitted needs samples"
        old, placement, fit = _fitted(old, placement, growth, config, stage, state, comm, samples)
        flops, fit_samples = fit.flops, fit.samples
        state_map = Fitted(growth.target)
    with phase("start"):
        grown = start_engine(
            config=config, stage=stage, state=state, comm=comm, loss_scale=scale, eod=eod
        )
    with phase("transfer"):
        report = _transfer(state_map, old, placement, grown, config=config, comm=comm)
    with phase("publish"):
        grown.publish()
    return grown, GrowthReport(
        seconds=max(comm.gather_floats(time.perf_counter() - begin)),
        bytes_moved=comm.sum_ints(report.bytes_written),
        bytes_between_ranks=comm.sum_ints(report.bytes_crossed),
        bytes_between_ranks_least=comm.sum_ints(report.bytes_least),
        peak_staging_bytes=int(max(comm.gather_floats(report.peak_staging_bytes))),
        fit_flops=flops,
        fit_samples=fit_samples,
        mine=report,
    )


class _Holder(Protocol):
    """Holds new state: an engine, or whole tensors on every rank."""

    @property
    def state(self) -> Target:
        """This rank's boxes."""
        ...

    @property
    def placement(self) -> Placement:
        """The placement of those boxes."""
        ...

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots of each parameter."""
        ...


@dataclass(frozen=True)
class _Whole:
    state: MemoryState
    placement: Placement
    slots: Sequence[Slot] = (MASTER,)


def _fitted(
    old: Source,
    placement: Placement,
    growth: Growth,
    config: Config,
    stage: Stage,
    state: RunState,
    comm: Comm,
    samples: Samples,
) -> tuple[MemoryState, Placement, GrowthFit]:
    """The fitted parameters of the large model, and the fit's cost on one process."""
    small = MemoryState.empty(growth.small, (MASTER,))
    everywhere = _Whole(small, Placement(growth.small, Layout(data=comm.world)))
    _transfer(Identity(growth.small), old, placement, everywhere, config=config, comm=comm)
    for key, values in small.tensors.items():
        small.tensors[key] = values.to(comm.device)
    large, fit = fit_growth(
        growth,
        model=stage.model,
        small=small,
        samples=samples,
        first=state.position.split(samples.sequence, samples.mixture)[1],
        batch=stage.plan.batch,
    )
    # Under ZeRO 1 each value comes from one rank, in case processors round differently.
    return large, Placement(growth.target, Layout(data=comm.world, zero=1)), fit


def _transfer(
    state_map: StateMap,
    old: Source,
    old_placement: Placement,
    new: _Holder,
    *,
    config: Config,
    comm: Comm,
) -> TransferReport:
    return transfer_between_ranks(
        state_map=state_map,
        old=old,
        old_placement=old_placement,
        new=new.state,
        new_placement=new.placement,
        slots=new.slots,
        channel=comm,
        seed=config.run.seed,
        staging_bytes=config.growth.staging_bytes,
        device=comm.device,
    )
