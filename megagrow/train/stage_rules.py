"""Evaluate the rules that end a growth stage (slope and marginal) for a run."""

from __future__ import annotations

from megagrow.config import Config
from megagrow.forecast.planned_ends import run_law
from megagrow.forecast.planner import size_of
from megagrow.schedule.end_rules import Decision, Seen, Sizes, marginal, next_stage, slope
from megagrow.train.run_plan import RunPlan


def decide(seen: Seen, *, config: Config, plan: RunPlan, index: int) -> Decision | None:
    """The verdict of a stage's rule after its last validation; None if data is insufficient."""
    until, points = config.stages[index].until, config.growth.points
    if until.slope is not None:
        return slope(seen, threshold=until.slope, points=points)
    return marginal(seen, run_law(config), _sizes(config, plan, index), points=points)


def carry(seen: Seen, *, config: Config, plan: RunPlan, index: int) -> Seen:
    """The data that a stage's rule keeps across the growth into it."""
    if config.stages[index].until.marginal is None:
        return Seen()
    sizes = _sizes(config, plan, index - 1)
    return next_stage(seen, run_law(config), small=sizes.small, large=sizes.large)


def _sizes(config: Config, plan: RunPlan, index: int) -> Sizes:
    """The sizes of a stage's model and the next one's."""
    law = run_law(config)
    small, large = (size_of(plan.stages[i].seen, law) for i in (index, index + 1))
    return Sizes(small.n, large.n, small.flops_per_token, large.flops_per_token)
