"""Summarise the finished runs of a savings benchmark: means, intervals, and verdicts.

The first seed tunes and chooses.  The best of several is partly the luckiest, so that seed is shown
next to the means and is in none of them.  All comparisons are paired by seed: the two runs of a
pair see the same data in the same order.

A bound (">=", "<=") is not a value.  A mean that includes bounds of one kind is itself a bound and
has no interval; with bounds of both kinds there is no mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megagrow.savings.bound import Bound
from megagrow.savings.results import (
    COSTS,
    Cost,
    Interval,
    Point,
    Saving,
    at_budget,
    interval,
    saving,
)

Plain = dict[str, Any]
Curves = Mapping[tuple[str, int], Sequence[Point]]  # by name and seed, ascending budgets


@dataclass(frozen=True)
class Summary:
    """Savings over the measuring seeds.

    Attributes:
        mean: None if there are none, or bounds of both kinds.
        sd: standard deviation of a pair; None for one seed, and for a bound.
        low, high: Student's 95 % interval of the mean; None as `sd`.
        seeds: how many count.
        bound: "" if `mean` is a value, else its kind: ">=", "<=" or both.
    """

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    seeds: int
    bound: str


def summarised(found: Sequence[Saving]) -> Summary:
    """The savings of one run over the measuring seeds."""
    if not found:
        return Summary(None, None, None, None, 0, "")
    bounds = sorted({one.bound for one in found} - {""})
    if len(bounds) > 1:
        return Summary(None, None, None, None, len(found), "/".join(bounds))
    over = interval([one.value for one in found])
    if bounds:
        return Summary(over.mean, None, None, None, over.seeds, bounds[0])
    return Summary(over.mean, over.sd, over.low, over.high, over.seeds, "")


@dataclass(frozen=True)
class Compared:
    """One run against another at a budget, paired by seed.

    Attributes:
        costs: the savings, by cost.
        by_seed: each pair, including the first seed's: `bound`, and the saving by cost.
        loss: differences of the losses (the run's minus the other's) over the measuring seeds;
            None if no pair is finished.
        unfinished: measuring seeds whose pair is not finished.
        diverged: seeds for which a run of the pair diverged.
    """

    costs: Mapping[Cost, Summary]
    by_seed: Mapping[int, Mapping[Cost, Saving]]
    loss: Interval | None
    unfinished: Sequence[int]
    diverged: Sequence[int]

    def plain(self) -> Plain:
        """In JSON form."""
        return {
            **{cost: asdict(one) for cost, one in self.costs.items()},
            "by_seed": {
                str(seed): {cost: {**asdict(one), "saving": one.value} for cost, one in own.items()}
                for seed, own in self.by_seed.items()
            },
            "loss_difference": None if self.loss is None else asdict(self.loss),
            "unfinished": list(self.unfinished),
            "diverged": list(self.diverged),
        }


def compared(
    curves: Curves, name: str, other: str, *, budget: float, seeds: Sequence[int]
) -> Compared:
    """Compare a run with another (see `saving` for the rule).

    Args:
        curves: finished runs.
        name, other: names of the two.
        budget: the budget at which to compare.
        seeds: the first is left out of means.
    """
    by_seed: dict[int, dict[Cost, Saving]] = {}
    differences, unfinished, diverged = [], [], []
    for seed in seeds:
        ours, theirs = curves.get((name, seed), ()), curves.get((other, seed), ())
        mine, best = at_budget(ours, budget), at_budget(theirs, budget)
        if mine is None or best is None:
            unfinished += [seed] if seed != seeds[0] else []
        elif math.inf in (mine.loss, best.loss):
            diverged.append(seed)
        else:
            differences += [mine.loss - best.loss] if seed != seeds[0] else []
            found = {cost: saving(theirs, ours, cost, budget) for cost in COSTS}
            by_seed[seed] = {cost: one for cost, one in found.items() if one is not None}
    fresh = [own for seed, own in by_seed.items() if seed != seeds[0]]
    costs = {cost: summarised([own[cost] for own in fresh if cost in own]) for cost in COSTS}
    over = interval(differences) if differences else None
    return Compared(costs, by_seed, over, unfinished, diverged)


def why_not(
    *,
    against_scratch: Compared,
    against_smalls: Mapping[str, Compared],
    edges: Sequence[str],
    bound: Bound | None,
) -> list[str]:
    """The objections to calling a saving; empty if it is one.

    Args:
        against_scratch: the grown run against the baseline.
        against_smalls: against every small model alone, by its name.
        edges: of the sweeps of everything that it is compared with.
        bound: the most that can be saved, if known.
    """
    reasons = []
    saved = against_scratch.costs["flops"]
    everyone = {"scratch": against_scratch, **against_smalls}
    for name, one in everyone.items():
        if one.diverged:
            reasons.append(f"a run diverged (seed {_list(one.diverged)}, against {name})")
        if one.unfinished:
            reasons.append(f"not finished (seed {_list(one.unfinished)}, against {name})")
    if against_scratch.loss is None:
        reasons.append("no seed but the one that tuned and chose")
    elif saved.bound:
        reasons.append(f"only bounded ({saved.bound})")
    elif saved.low is None or saved.high is None:
        reasons.append("one seed has no interval")
    elif saved.high < 0:
        reasons.append("scratch is better")
    elif saved.low <= 0:
        reasons.append("interval includes 0")
    for name, one in against_smalls.items():
        if one.loss is None or one.loss.low is None or one.loss.high is None:
            if not one.unfinished:
                reasons.append(f"no interval against {name}")
        elif one.loss.low > 0:
            reasons.append(f"small alone is better ({name})")
        elif one.loss.high >= 0:
            reasons.append(f"interval includes 0 against small alone ({name})")
    reasons += edges
    if bound is not None and saved.sd is not None and not bound.open:
        noise = saved.sd / math.sqrt(saved.seeds)
        if bound.saving < 2 * noise:
            reasons.append(
                f"bound below twice the noise ({bound.saving:.1%}, standard error {noise:.1%})"
            )
    return reasons


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
