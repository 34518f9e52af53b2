"""What the runs of a savings benchmark tell: losses, costs, and what growth saved."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from scipy import stats

from megagrow.bench.savings.config import Branch, Member
from megagrow.report.log import read_metrics
from megagrow.report.run import Run, summarize
from megagrow.report.thin import Step
from megagrow.train.plan import Stage

Cost = Literal["flops", "tokens", "seconds"]
COSTS: tuple[Cost, ...] = ("flops", "tokens", "seconds")
_CONFIDENCE = 0.95
SPEEDS = "speeds.json"  # in the benchmark's directory: tokens/s by `stage_key`


@dataclass(frozen=True)
class Point:
    """A finished branch: what it cost from the very start, and how far it came.

    Attributes:
        budget: FLOPs it was sized to.
        flops: all growth stages, and the growths themselves at the speed of the run.
        tokens: trained on, all stages.
        seconds: every step at its stage's speed, and the growths.  The speed is the one measured
            in turns (`clock`), else that of the stage's fastest tenth of steps: what others do
            on the machine at the time is hardly in it.
        loss: validation loss after the decay, nats a token.
        growth_seconds: of `seconds`, what the growths took.
        growth_flops: of `flops`, what the growths are charged.
    """

    budget: float
    flops: float
    tokens: float
    seconds: float
    loss: float
    growth_seconds: float
    growth_flops: float


@dataclass(frozen=True)
class Saving:
    """1 - C_grown / C_scratch at equal validation loss.

    Attributes:
        loss: at which they are compared.
        grown, scratch: what each cost.
        bound: "" where both costs lie within the budgets; ">=" where the grown run was better
            at its smallest budget already, so that it saves this at least; "<=" the other way.
    """

    loss: float
    grown: float
    scratch: float
    bound: str = ""

    @property
    def value(self) -> float:
        """The saving, as a fraction of the baseline's cost."""
        return 1 - self.grown / self.scratch


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and Student's t interval of it; no interval for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def branch_directory(member: Member, branch: Branch) -> Path:
    """Where a branch's run is."""
    return Path(member.branch(branch).run.dir)


def read_log(directory: Path) -> Run | None:
    """A run's log summed up; None where there is none yet."""
    path = directory / "metrics.jsonl"
    return summarize(read_metrics(path)) if path.is_file() else None


def finished(member: Member, branch: Branch) -> bool:
    """Whether a branch came to its end."""
    run = read_log(branch_directory(member, branch))
    return run is not None and run.end.get("step") == branch.end


def stage_key(stage: Stage) -> str:
    """What the speed of a growth stage depends on, as text."""
    facts = {**stage.seen.model_dump(), "batch": stage.plan.batch.global_}
    return json.dumps(facts, sort_keys=True)


def read_points(
    member: Member, branches: Sequence[Branch], *, speeds: Sequence[float | None] = ()
) -> list[Point]:
    """The finished branches of a member, in the order of their budgets.

    Args:
        member: whose.
        branches: all of its.
        speeds: tokens/s of its growth stages where they were measured in turns.
    """
    trunk = read_log(Path(member.trunk(branches[-1].start, stop=branches[-1].start).run.dir))
    points = []
    for branch in branches:
        run = read_log(branch_directory(member, branch))
        if trunk is not None and run is not None and run.end.get("step") == branch.end:
            points.append(_point(trunk, run, branch, speeds))
    return points


def _point(trunk: Run, run: Run, branch: Branch, measured: Sequence[float | None]) -> Point:
    steps = [step for step in trunk.steps if step.step <= branch.start]
    steps += [step for step in run.steps if step.step > branch.start]
    seconds, speeds = _seconds(steps, measured)
    growths = [growth for growth in trunk.growths if growth.step < branch.start]
    growth_seconds = math.fsum(growth.seconds for growth in growths)
    growth_flops = math.fsum(growth.seconds * speeds[growth.stage] for growth in growths)
    return Point(
        budget=branch.budget,
        flops=steps[-1].flops + growth_flops,
        tokens=steps[-1].tokens,
        seconds=seconds + growth_seconds,
        loss=run.final_validation,
        growth_seconds=growth_seconds,
        growth_flops=growth_flops,
    )


def _seconds(
    steps: Sequence[Step], measured: Sequence[float | None]
) -> tuple[float, dict[int, float]]:
    """Time of all steps at their stage's speed, measured or its fastest tenth; its FLOP/s."""
    total, speeds = 0.0, {}
    tokens = flops = 0.0
    for stage in sorted({step.stage for step in steps}):
        own = [step for step in steps if step.stage == stage]
        rates = sorted(step.tokens_per_second for step in own)
        known = measured[stage] if stage < len(measured) else None
        speed = known or rates[(9 * (len(rates) - 1)) // 10]
        taken = (own[-1].tokens - tokens) / speed
        speeds[stage] = (own[-1].flops - flops) / taken
        total += taken
        tokens, flops = own[-1].tokens, own[-1].flops
    return total, speeds


def cost_at(points: Sequence[Point], loss: float, cost: Cost) -> float | None:
    """What it takes to come to a loss: log-log interpolation between two finished budgets.

    None where no two budgets enclose the loss; extrapolated is nothing.
    """
    for left, right in pairwise(points):
        if left.loss >= loss >= right.loss and left.loss > right.loss:
            share = math.log(left.loss / loss) / math.log(left.loss / right.loss)
            low, high = getattr(left, cost), getattr(right, cost)
            return math.exp(math.log(low) + share * math.log(high / low))
    return None


def saving(scratch: Sequence[Point], grown: Sequence[Point], cost: Cost) -> Saving | None:
    """At the lowest loss that both reach; None where their losses do not overlap at all.

    That is the baseline's loss at its largest budget where growth is better, and the grown run's
    where it is not.
    """
    if not scratch or not grown:
        return None
    best, mine = min(scratch, key=lambda p: p.loss), min(grown, key=lambda p: p.loss)
    if mine.loss <= best.loss:
        at = cost_at(grown, best.loss, cost)
        if at is not None:
            return Saving(best.loss, at, getattr(best, cost))
        first = grown[0]
        return Saving(best.loss, getattr(first, cost), getattr(best, cost), ">=")
    at = cost_at(scratch, mine.loss, cost)
    if at is not None:
        return Saving(mine.loss, getattr(mine, cost), at)
    return Saving(mine.loss, getattr(mine, cost), getattr(scratch[0], cost), "<=")


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval (Student's t over seeds, which are few)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    half *= statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))
