"""Read the results of a savings benchmark's runs: losses, costs, and savings."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

from scipy import stats

from megagrow import __version__
from megagrow.checkpoint import step_path
from megagrow.report.log import Line, iter_metrics, last_line, read_metrics
from megagrow.report.run import Run, summarize
from megagrow.report.step_facts import StepFacts
from megagrow.savings.members import Branch, Member
from megagrow.train.checkpoints import DIRECTORY
from megagrow.train.run_plan import Stage

Cost = Literal["flops", "tokens", "seconds"]
COSTS: tuple[Cost, ...] = ("flops", "tokens", "seconds")
_CONFIDENCE = 0.95
LOG = "metrics.jsonl"
DIVERGED = "not_finite"  # the last event in the log of such a run
SPEEDS = "speeds.json"  # in the benchmark's directory: tokens/s by `stage_key`


@dataclass(frozen=True)
class Point:
    """A finished branch: its total cost and its loss.

    Attributes:
        budget: FLOPs for which it was sized.
        flops: all growth stages, and the growths themselves at the speed of the run.
        tokens: trained on, in all stages.
        seconds: every step at its stage's speed, and the growths.  The speed is the one measured
            in turns (`clock`), else that of the stage's fastest tenth of steps, which is hardly
            affected by other load on the machine.
        loss: validation loss after the decay in nats per token, of the mean weights if they are
            averaged; infinite if the run diverged.
        growth_seconds: the growths' part of `seconds`.
        growth_flops: the growths' part of `flops`.
        last_loss: loss of the last weights, whether or not they are averaged.
    """

    budget: float
    flops: float
    tokens: float
    seconds: float
    loss: float
    growth_seconds: float
    growth_flops: float
    last_loss: float | None = None


@dataclass(frozen=True)
class Saving:
    """1 - C_grown / C_scratch at equal validation loss.

    Attributes:
        loss: at which they are compared.
        grown, scratch: the cost of each.
        bound: "" if both costs are within the budgets; ">=" if the grown run was already better
            at its smallest budget, so that it saves at least this much; "<=" for the reverse.
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
    """A mean over seeds, standard deviation and Student's t interval; one seed has no spread."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    seeds: int


def read_log(directory: Path) -> Run | None:
    """Summarise a run's log; None if there is none yet."""
    path = directory / LOG
    return summarize(read_metrics(path)) if path.is_file() else None


def finished(directory: Path, end: int) -> bool:
    """Whether a run reached its step `end` or non-finite numbers."""
    path = directory / LOG
    line = last_line(path) if path.is_file() else None
    if line is None:
        return False
    return line["event"] == DIVERGED or (line["event"] == "end" and line.get("step") == end)


def decayed(directory: Path, branch: Branch) -> bool:
    """Whether a branch's run is finished and started where this branch does.

    The directory's name does not show it: with another `decay` it is the same.
    """
    return finished(directory, branch.end) and begun_at(directory) == branch.start


def begun_at(directory: Path) -> int | None:
    """The step at which a run started; None before its log says."""
    path = directory / LOG
    line = next(iter_metrics(path), None) if path.is_file() else None
    return None if line is None else line.get("step")


def diverged(directory: Path) -> bool:
    """Whether a run ended with non-finite numbers and cannot continue."""
    path = directory / LOG
    line = last_line(path) if path.is_file() else None
    return line is not None and line["event"] == DIVERGED


def averaged(directory: Path, average: float, decay: float) -> float | None:
    """The loss of a finished run's mean weights; None if the mean is incomplete.

    Args:
        average: the fraction of the decay that the mean must cover.
        decay: the decay as a fraction of the run.
    """
    line = _average(directory / LOG, _stamp(directory))
    whole = line.get("states") == line.get("wanted") and line.get("last") == average * decay
    return line["val_loss"] if line and whole else None


@cache
def _average(path: Path, stamp: object) -> Line:
    found = [line for line in read_metrics(path) if line["event"] == "average"]
    return found[-1] if found else {}


def made_by(*directories: Path) -> str:
    """The first version of megagrow named in the given logs; this one, if none is."""
    for directory in directories:
        if (directory / LOG).is_file() and (found := _version(directory / LOG, _stamp(directory))):
            return found
    return __version__


@cache
def _version(path: Path, stamp: object) -> str | None:
    found = [line["version"] for line in read_metrics(path) if "version" in line]
    return str(found[-1]) if found else None


def stage_key(stage: Stage) -> str:
    """Everything that a growth stage's speed depends on, as text."""
    facts = {**stage.seen.model_dump(), "batch": stage.plan.batch.global_}
    return json.dumps(facts, sort_keys=True)


def is_done(member: Member, branch: Branch) -> bool:
    """Whether nothing is left to train for a budget of a member."""
    here = member.place(branch)
    if decayed(here, branch):
        whole = member.average is None or diverged(here)
        return whole or averaged(here, member.average or 0.0, branch.decay) is not None
    # A stable run that diverged after the start of a branch says nothing about that branch.
    trunk = member.stable(branch)
    return diverged(trunk) and not step_path(trunk / DIRECTORY, branch.start).exists()


def read_point(
    member: Member, branch: Branch, *, speeds: Sequence[float | None] = ()
) -> Point | None:
    """Read a finished branch; None if it is not finished, an infinite loss if it diverged.

    Args:
        member: the member.
        branch: one of its branches.
        speeds: tokens/s of its growth stages, if they were measured in turns.
    """
    here, trunk = member.place(branch), member.stable(branch)
    if not is_done(member, branch):
        return None
    if not decayed(here, branch) or diverged(here):
        unknown = math.nan
        return Point(branch.budget, branch.budget, unknown, unknown, math.inf, 0.0, 0.0)
    found = _read(trunk, here, branch, tuple(speeds), _stamp(trunk), _stamp(here))
    mean = averaged(here, member.average, branch.decay) if member.average is not None else None
    return found if mean is None else replace(found, loss=mean)


def _stamp(directory: Path) -> tuple[int, int]:
    """Identifies a version of a log, to see whether it has changed."""
    found = (directory / LOG).stat()
    return found.st_size, found.st_mtime_ns


@cache
def _read(
    trunk: Path, here: Path, branch: Branch, speeds: Sequence[float | None], *stamps: object
) -> Point:
    stable, run = read_log(trunk), read_log(here)
    assert stable is not None and run is not None
    return _point(stable, run, branch, speeds)


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
        last_loss=run.final_validation,
    )


def _seconds(
    steps: Sequence[StepFacts], measured: Sequence[float | None]
) -> tuple[float, dict[int, float]]:
    """Total time at each stage's speed (measured, or its fastest tenth); FLOP/s by stage."""
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
    """The cost of reaching a loss: log-log interpolation between two finished budgets.

    None if no two budgets enclose the loss; there is no extrapolation.
    """
    for left, right in pairwise(points):
        if math.inf > left.loss >= loss >= right.loss and left.loss > right.loss:
            share = math.log(left.loss / loss) / math.log(left.loss / right.loss)
            low, high = getattr(left, cost), getattr(right, cost)
            return math.exp(math.log(low) + share * math.log(high / low))
    return None


def saving(
    scratch: Sequence[Point], grown: Sequence[Point], cost: Cost, budget: float
) -> Saving | None:
    """The saving at a budget; None if one of them has not finished it, or diverged.

    If growth is better there, it is the grown run's cost of reaching the baseline's loss; otherwise
    the baseline's cost of reaching the grown run's loss.  At the smallest and at the largest budget
    the other curve may be the one that reaches far enough; if neither does, it is a bound.
    """
    ours, theirs = at_budget(grown, budget), at_budget(scratch, budget)
    if ours is None or theirs is None or math.inf in (ours.loss, theirs.loss):
        return None
    mine, best = getattr(ours, cost), getattr(theirs, cost)
    to_theirs, to_ours = cost_at(grown, theirs.loss, cost), cost_at(scratch, ours.loss, cost)
    same_loss = Saving(theirs.loss, to_theirs, best) if to_theirs is not None else None
    same_run = Saving(ours.loss, mine, to_ours) if to_ours is not None else None
    if ours.loss <= theirs.loss:
        found = same_loss or same_run
        return found or Saving(theirs.loss, getattr(grown[0], cost), best, ">=")
    found = same_run or same_loss
    return found or Saving(ours.loss, mine, getattr(scratch[0], cost), "<=")


def at_budget(points: Sequence[Point], budget: float) -> Point | None:
    """The point of a budget, if it is finished."""
    return next((point for point in points if point.budget == budget), None)


def interval(values: Sequence[float]) -> Interval:
    """Mean, standard deviation and 95 % interval (Student's t over seeds, which are few)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, None, len(values))
    deviation = statistics.stdev(values)
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    half *= deviation / math.sqrt(len(values))
    return Interval(mean, deviation, mean - half, mean + half, len(values))
