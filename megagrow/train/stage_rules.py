"""Evaluate the rules that watch a run (see `megagrow.config.rules`), and may end a growth stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megagrow.config import Config
from megagrow.forecast.planned_ends import run_law
from megagrow.forecast.planner import size_of
from megagrow.schedule.end_rules import Decision, Seen, Sizes, marginal, next_stage, slope
from megagrow.train.run_plan import RunPlan, Stage


@dataclass(frozen=True)
class Watcher:
    """A rule's two questions, each about the stage with an index in a run.

    Attributes:
        decide: the verdict after the stage's last validation; None if data is insufficient.
        carry: the data that it keeps across the growth into the stage.
    """

    decide: Callable[[Seen, Config, RunPlan, int], Decision | None]
    carry: Callable[[Seen, Config, RunPlan, int], Seen]


def decide(seen: Seen, *, config: Config, plan: RunPlan, index: int) -> Decision | None:
    """The verdict of a stage's rule after its last validation; None if data is insufficient.

    Raises:
        KeyError: the stage has no rule that watches the run.
    """
    return WATCHERS[str(config.stages[index].until.rule)].decide(seen, config, plan, index)


def settles_at(plan: RunPlan, stage: Stage, *, warmup: int) -> int:
    """The step at which a stage's warm-up, or its re-warming after a growth, is over.

    Args:
        warmup: the steps of the stage's own schedule.
    """
    start, settled = stage.plan.start_step, plan.learning_rate.warmup
    if stage.growth is not None:
        settled = max(settled if start == 0 else 0, start + stage.growth.rewarm)
    return max(settled, start + warmup)


def carry(seen: Seen, *, config: Config, plan: RunPlan, index: int) -> Seen:
    """The data that a stage's rule keeps across the growth into it."""
    until = config.stages[index].until
    if not until.watches:
        return Seen()
    return WATCHERS[str(until.rule)].carry(seen, config, plan, index)


def _slope(seen: Seen, config: Config, plan: RunPlan, index: int) -> Decision | None:
    threshold = config.stages[index].until.slope
    assert threshold is not None
    return slope(seen, threshold=threshold, points=config.growth.points)


def _marginal(seen: Seen, config: Config, plan: RunPlan, index: int) -> Decision | None:
    sizes = _sizes(config, plan, index)
    return marginal(seen, run_law(config), sizes, points=config.growth.points)


def _nothing(seen: Seen, config: Config, plan: RunPlan, index: int) -> Seen:
    return Seen()


def _scaled_curve(seen: Seen, config: Config, plan: RunPlan, index: int) -> Seen:
    sizes = _sizes(config, plan, index - 1)
    return next_stage(seen, run_law(config), small=sizes.small, large=sizes.large)


# One for every rule that watches the run (a test compares the two tables).
WATCHERS: dict[str, Watcher] = {
    "slope": Watcher(_slope, _nothing),
    "marginal": Watcher(_marginal, _scaled_curve),
}


def _sizes(config: Config, plan: RunPlan, index: int) -> Sizes:
    """The sizes of a stage's model and the next one's."""
    law = run_law(config)
    small, large = (size_of(plan.stages[i].seen, law) for i in (index, index + 1))
    return Sizes(small.n, large.n, small.flops_per_token, large.flops_per_token)
