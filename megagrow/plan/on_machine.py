"""Plan a run on a machine: layout, step time, memory and growth time of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.config import Config, LayoutConfig, ModelConfig, UntilConfig
from megagrow.errors import ConfigError, MegagrowError
from megagrow.forecast.cost import STATE_BYTES
from megagrow.forecast.machine import (
    GrowthTime,
    MachineConfig,
    StepTime,
    growth_time,
    layouts_to_try,
    step_time,
)
from megagrow.forecast.memory import local_sizes
from megagrow.plan.dry_run import moves, sample_ranks, training_peaks
from megagrow.report.units import binary_bytes, duration, human
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.train.run_plan import RunPlan, plan_run

_SPARE = 0.9  # fraction of a device's memory to plan with; the rest is a safety margin


@dataclass(frozen=True)
class PlacedStage:
    """A growth stage on a machine.

    Attributes:
        layout: the process grid.
        memory: bytes on the fullest device.
        step: the time of one step.
    """

    layout: Layout
    memory: int
    step: StepTime


def place_stage(config: Config, plan: RunPlan, index: int, machine: MachineConfig) -> PlacedStage:
    """The memory that a stage needs on every device, and its step time."""
    stage, placement = plan.stages[index], plan.placement(index)
    config = stage.settings(config)
    pipes = range(stage.layout.pipeline)
    # What is frozen is only gathered, at ZeRO 3.
    frozen = None if stage.layout.zero == 3 else False
    held = max(sum(map(sum, local_sizes(placement, pipe, frozen=frozen))) for pipe in pipes)
    memory = max(peak.total for peak in training_peaks(config, plan, index))
    step = step_time(
        config,
        stage.seen,
        placement,
        machine,
        held=held,
        sequence_parallel=stage.plan.layout.sequence_parallel,
    )
    return PlacedStage(stage.layout, memory, step)


def best_layout(config: Config, model: ModelConfig, machine: MachineConfig) -> PlacedStage | None:
    """The layout with the shortest step that fits into memory; None if none does.

    Args:
        config: the run: batch, precision and data.
        model: the stage's.
        machine: all of it is used.
    """
    best: PlacedStage | None = None
    stage = config.stages[0].model_copy(update={"until": UntilConfig(steps=1)})
    for layout in layouts_to_try(model, machine):
        spread = LayoutConfig(tensor=layout.tensor, pipeline=layout.pipeline, zero=layout.zero)
        one = config.model_copy(update={"model": model, "layout": spread, "stages": [stage]})
        try:
            plan = plan_run(one, world=machine.world, vocabulary=None)
        except MegagrowError:  # this layout does not suit this model or batch
            continue
        placed = place_stage(one, plan, 0, machine)
        if placed.memory <= _SPARE * machine.memory and (
            best is None or placed.step.total < best.step.total
        ):
            best = placed
    return best


def require_layout(config: Config, model: ModelConfig, machine: MachineConfig) -> PlacedStage:
    """The same, but raises ConfigError if nothing fits."""
    found = best_layout(config, model, machine)
    if found is None:
        raise ConfigError(
            f"no layout of {machine.world} devices takes {model.layers} layers x "
            f"{model.hidden} hidden",
            found=f"{machine.memory / 1e9:.0f} GB a device, batch.global "
            f"{config.batch.global_}, batch.micro {config.batch.micro}",
            fix="more nodes, batch.micro=1, a larger batch.global, or "
            "model.activation_checkpointing=full",
        )
    return found


def cost_of_growth(
    plan: RunPlan, index: int, machine: MachineConfig, *, ranks: Sequence[int]
) -> GrowthTime:
    """The time of the growth into a stage, on the slowest of some ranks."""
    state = STATE_BYTES * len(ADAM_SLOTS)
    before, after = (plan.placement(i).catalog.parameters for i in (index - 1, index))
    counts = moves(plan, index, ranks=ranks)
    return growth_time(counts, machine, old_bytes=state * before, new_bytes=state * after)


def describe_on_machine(config: Config, machine: MachineConfig, *, rank: int | None) -> str:
    """All stages of a run on a machine, in the layouts that its configuration sets.

    Args:
        config: the run, with its vocabulary known.
        machine: with as many devices as the run has processes.
        rank: count a growth's bytes for this rank; None uses a sample of the ranks.

    Raises:
        MegagrowError: the run's layouts do not work there.
    """
    if rank is not None and not 0 <= rank < machine.world:
        raise ConfigError("--rank: no such rank", found=rank, expected=f"0 to {machine.world - 1}")
    plan = plan_run(config, world=machine.world, vocabulary=None)
    ranks = [rank] if rank is not None else sample_ranks(machine.world)
    placed = [place_stage(config, plan, stage.index, machine) for stage in plan.stages]
    growths = [cost_of_growth(plan, stage.index, machine, ranks=ranks) for stage in plan.stages[1:]]
    sampled = "as asked for" if rank is not None else f"the slowest of {len(ranks)} looked at"
    seconds = sum(
        one.step.total * stage.plan.steps for one, stage in zip(placed, plan.stages, strict=True)
    )
    state = plan.placement(len(plan.stages) - 1).catalog.parameters
    head = (
        f"{machine.nodes} nodes x {machine.gpus} devices; {state / 1e9:.4g} billion parameters at "
        f"the end; {plan.total_steps:,} steps in {seconds / 86400:.3g} days of step time"
    )
    fits = [one for one in placed if one.memory > machine.memory]
    warning = (
        f"\nstage {placed.index(fits[0])} does not fit: {fits[0].memory / 1e9:.4g} GB a device of "
        f"{machine.memory / 1e9:.4g} GB"
        if fits
        else ""
    )
    return f"{head}\n{_table(placed, growths, sampled=sampled)}{warning}"


def _table(placed: list[PlacedStage], growths: list[GrowthTime], *, sampled: str) -> str:
    """Step time, memory and growths on a machine."""
    head = ("stage", "layout", "memory", "step", "MFU", "compute", "bubble", "tensor", "pipe",
            "data")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for index, one in enumerate(placed):
        step = one.step
        parts = (step.compute, step.bubble, step.tensor, step.pipeline, step.data)
        rows.append(
            (
                str(index),
                str(one.layout),
                binary_bytes(one.memory),
                duration(step.total),
                f"{step.mfu:.1%}",
                *(f"{part / step.total:.0%}" for part in parts),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    for index, growth in enumerate(growths, start=1):
        lines.append(
            f"growth into stage {index}: rank {growth.rank} ({sampled}) copies "
            f"{human(growth.local, 'B')} locally, receives {human(growth.intra, 'B')} within "
            f"its node and {human(growth.inter, 'B')} from others, {growth.seconds:.3g} s; through "
            f"files {growth.files_seconds:.3g} s"
        )
    return "\n".join(lines)
