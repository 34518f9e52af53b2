"""The planner's answer for a run: a schedule, its saving with an interval, a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.config import Config
from megagrow.errors import ConfigError
from megagrow.forecast.fit import Fit, RunPoints, binned
from megagrow.forecast.machine import MachineConfig
from megagrow.forecast.planner import (
    Curves,
    Schedule,
    Size,
    best_alone,
    plan_schedule,
    predict,
    sizes_towards,
)
from megagrow.forecast.scaling import PUBLISHED, ScalingLaw, Unit
from megagrow.growth.registry import find_operator
from megagrow.plan.on_machine import PlacedStage, best_layout, require_layout
from megagrow.report.log import read_metrics
from megagrow.report.run import number, summarize

_PEAK = 0.999  # of the peak learning rate: what counts as stable


@dataclass(frozen=True)
class Proposal:
    """The planner's result.

    Attributes:
        law: the scaling law used.
        curves: of that law.
        schedule: the best one.
        scratch_loss: the target's loss from scratch, with the same budget.
        low, high: the saving under other laws: bootstrap samples of a fit, or all published ones.
        interval: what `low` and `high` are, in words.
        alone: the best size to train from scratch with the budget, and its loss.
        placed: a layout for each stage, if a machine was given.
    """

    law: ScalingLaw
    curves: Curves
    schedule: Schedule
    scratch_loss: float
    low: float
    high: float
    interval: str
    alone: tuple[Size, float]
    placed: tuple[PlacedStage, ...]


def propose(
    config: Config,
    *,
    law: ScalingLaw,
    fit: Fit | None,
    flops: float,
    operators: Sequence[str],
    most_stages: int,
    added_loss: float = 0.0,
    machine: MachineConfig | None = None,
) -> Proposal:
    """Find the best schedule for the model of a run.

    Args:
        config: its `model` is the target; its batch turns steps into tokens.
        law: the scaling law to plan with.
        fit: the law's fit, if it was fitted; its samples give the interval.
        flops: the budget.
        operators: a depth operator, a width operator, or both.
        most_stages: maximum number of stages.
        added_loss: what a growth adds to the loss.
        machine: sizes without a layout that fits are excluded, and each stage gets its best layout.

    Raises:
        ConfigError: the target does not fit.
    """
    target = config.model
    batch = config.batch.global_ * target.sequence
    curves = Curves(law, batch_tokens=batch)
    sizes = sizes_towards(target, law, operators=operators)
    placed: dict[Size, PlacedStage | None] = {}

    def fits(size: Size) -> bool:
        if machine is None:
            return True
        if size not in placed:
            placed[size] = best_layout(config, size.model, machine)
        return placed[size] is not None

    if machine is not None:
        require_layout(config, target, machine)
    schedule = plan_schedule(
        curves,
        sizes,
        flops=flops,
        most_stages=most_stages,
        added_loss=added_loss,
        allowed=fits,
    )
    budget = schedule.stages[-1].end_flops
    scratch = budget / sizes[-1].flops_per_token
    others = fit.samples if fit is not None else tuple(PUBLISHED.values())
    savings = [
        one.saving
        for one in (
            predict(Curves(other, batch_tokens=batch), _recount(schedule, other), added_loss)
            for other in others
        )
        if one is not None
    ] or [schedule.saving]
    if fit is not None:
        low, high = (float(x) for x in np.quantile(savings, (0.025, 0.975)))
        words = f"95 % of {len(savings)} bootstrap samples of the fit"
    else:
        low, high = min(savings), max(savings)
        words = "the same schedule under all published laws"
    return Proposal(
        law=law,
        curves=curves,
        schedule=schedule,
        scratch_loss=curves.loss_at(sizes[-1], scratch),
        low=low,
        high=high,
        interval=words,
        alone=best_alone(curves, [size for size in sizes if fits(size)], flops=budget),
        placed=tuple(
            found
            for stage in schedule.stages
            if machine is not None and (found := placed[stage.size]) is not None
        ),
    )


def _recount(schedule: Schedule, law: ScalingLaw) -> Schedule:
    """The same stages, with parameters counted as another law counts them."""
    target = schedule.stages[-1].size
    names = ("depth_stack", "width")  # any of each kind
    counted = {(s.depth, s.width): s for s in sizes_towards(target.model, law, operators=names)}
    return replace(
        schedule,
        stages=tuple(
            replace(stage, size=counted[stage.size.depth, stage.size.width])
            for stage in schedule.stages
        ),
    )


def run_points(directories: Sequence[str | Path], *, unit: Unit) -> list[RunPoints]:
    """Data on L(N, S) from runs: their training losses at the peak learning rate.

    Only the first growth stage of a run counts, since a grown model did not start from scratch.

    Raises:
        DataError: a directory holds no run, or its log is damaged.
    """
    found = []
    for directory in directories:
        run = summarize(read_metrics(Path(directory) / "metrics.jsonl"))
        steps = [step for step in run.steps if step.stage == 0]
        peak = max((step.lr for step in steps), default=0.0)
        steady = [step for step in steps if step.lr >= _PEAK * peak]
        n = number(run.start, "parameters")
        s = [step.step if unit == "steps" else step.tokens for step in steady]
        found.append(binned(n, s, [step.loss for step in steady]))
    return [points for points in found if len(points.s)]


def ready_config(config: Config, proposal: Proposal, *, operators: Sequence[str]) -> dict[str, Any]:
    """The run with the proposed stages, as plain data for a YAML file."""
    depth = next((name for name in operators if find_operator(name).deepens), None)
    width = next((name for name in operators if find_operator(name).widens), None)
    settings: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    stages = proposal.schedule.stages
    settings["model"] = stages[0].size.model.model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    step = config.batch.global_ * config.model.sequence
    settings["stages"] = []
    done = 0
    for index, stage in enumerate(stages):
        steps = max(done + 1, round(stage.end_tokens / step))
        done = steps
        one: dict[str, Any] = {"until": {"steps": steps}}
        if index > 0:
            before = stages[index - 1].size
            one["grow"] = _growth(before, stage.size, depth=depth, width=width)
        if proposal.placed:
            layout = proposal.placed[index].layout
            spread = {"tensor": layout.tensor, "pipeline": layout.pipeline, "zero": layout.zero}
            if index == 0:
                settings["layout"] = {**settings["layout"], **spread}
            else:
                one["layout"] = spread
        settings["stages"].append(one)
    return settings


def _growth(before: Size, after: Size, *, depth: str | None, width: str | None) -> dict[str, Any]:
    names: list[str | None] = []
    target: dict[str, Any] = {}
    small, large = before.model, after.model
    if before.width != after.width:
        names.append(width)
        sizes = ["hidden", "heads", "ffn"] + ["kv_heads"] * (large.kv_heads is not None)
        target |= {key: getattr(large, key) for key in sizes}
    if small.layers != large.layers:
        names.append(depth)
        target["layers"] = large.layers
    if None in names:
        raise ConfigError("no operator for a growth of the plan", found=target)
    return {"operator": "+".join(str(name) for name in names), "target": target}
