"""What the finished runs of a savings benchmark say together: means, intervals, and a claim.

The first seed chooses: the variants that come furthest with it run with the other seeds too.  The
best of several is partly the luckiest, so the seed that chose a variant is shown beside its mean
and is in neither the mean nor the interval.  Where nothing was chosen, every seed counts.

A bound (">=", "<=") is no value.  A mean with bounds of one kind in it is a bound itself and has no
interval; bounds of both kinds have no mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megagrow.bench.savings.config import SCRATCH, SMALL
from megagrow.bench.savings.results import COSTS, Point, Saving, interval, saving

Result = dict[str, Any]
Points = Mapping[tuple[str, int], Sequence[Point]]


@dataclass(frozen=True)
class Summary:
    """Savings over seeds.

    Attributes:
        mean: of the seeds that count; None where bounds of both kinds meet.
        low, high: Student's 95 % interval of it; None for one seed, and for a bound.
        seeds: how many count.
        bound: "" where `mean` is a value, else what it is: ">=" or "<=".
        chosen_by: the seed that chose the variant, where it is left out; else None.
    """

    mean: float | None
    low: float | None
    high: float | None
    seeds: int
    bound: str
    chosen_by: int | None


def summarised(by_seed: Mapping[int, Saving], *, chosen_by: int | None) -> Summary:
    """The savings of one variant over its seeds.

    Args:
        by_seed: at least one.
        chosen_by: the seed that chose it; left out where there are others.
    """
    fresh = [one for seed, one in by_seed.items() if seed != chosen_by]
    counted = fresh or list(by_seed.values())
    left_out = chosen_by if fresh and chosen_by in by_seed else None
    bounds = {one.bound for one in counted} - {""}
    if len(bounds) > 1:
        return Summary(None, None, None, len(counted), "/".join(sorted(bounds)), left_out)
    found = interval([one.value for one in counted])
    if bounds:
        return Summary(found.mean, None, None, found.seeds, bounds.pop(), left_out)
    return Summary(found.mean, found.low, found.high, found.seeds, "", left_out)


def ranking(points: Points, variants: Sequence[str], seed: int) -> list[str]:
    """Variants that have finished something: those that came furthest, the best first."""
    found = {
        name: (-points[name, seed][-1].budget, points[name, seed][-1].loss)
        for name in variants
        if points.get((name, seed))
    }
    return sorted(found, key=lambda name: found[name])


def derived(points: Points, *, variants: Sequence[str], seeds: Sequence[int]) -> Result:
    """All that follows from what was finished: `variants` and `controls` of a result.

    Args:
        points: by name and seed.
        variants: their names.
        seeds: the first is the one that chooses, where there is a choice.
    """
    chosen_by = seeds[0] if len(variants) > 1 else None
    found: Result = {"variants": {}, "controls": {}}
    for name in variants:
        against = _compared(points, name, SCRATCH, seeds, chosen_by)
        if against:
            found["variants"][name] = against
    for name in variants:
        small = f"{SMALL}_{name}"
        alone, grown = points.get((small, seeds[0]), ()), points.get((name, seeds[0]), ())
        if alone:
            found["controls"][small] = {
                "against_scratch": _compared(points, small, SCRATCH, seeds[:1], None),
                "growth_against_it": _compared(points, name, small, seeds[:1], None),
                "beaten_at_the_largest_budget": _beaten(grown, alone),
            }
    return found


def claim(result: Mapping[str, Any], points: Points) -> Result:
    """What may be said of the best variant, or why nothing may.

    Args:
        result: with `sweep`, `variants`, `controls` and `config`.
        points: by name and seed.

    Returns:
        `variant`; `saving` and its `bound`, or None and `why_not`, a list of reasons.
    """
    config = result["config"]
    best = next(iter(ranking(points, list(config["variants"]), config["seeds"][0])), None)
    found = result["variants"].get(best, {}).get("flops")
    why_not = []
    if found is None:
        return {"variant": best, "saving": None, "bound": "", "why_not": ["nothing to compare yet"]}
    if result["sweep"]["best_at_an_edge"]:
        why_not.append(
            "the baseline's best learning rate is at an edge of the sweep, so a better baseline is "
            "likely: widen sweep.lr"
        )
    if len(config["variants"]) > 1 and found["chosen_by"] is None:
        why_not.append("no seed but the one that chose the best variant")
    if found["mean"] is None:
        why_not.append("some seeds have a lower bound alone and some an upper one")
    control = result["controls"].get(f"{SMALL}_{best}", {}).get("beaten_at_the_largest_budget")
    if control is False:
        why_not.append("the small model alone is better: the target is too large for the budget")
    return {
        "variant": best,
        "saving": None if why_not else found["mean"],
        "bound": found["bound"],
        "why_not": why_not,
    }


def _compared(
    points: Points, name: str, other: str, seeds: Sequence[int], chosen_by: int | None
) -> Result:
    """Savings of one against another in every cost: by seed, and over the seeds that count."""
    found: Result = {}
    for cost in COSTS:
        by_seed: dict[int, Saving] = {}
        for seed in seeds:
            one = saving(points.get((other, seed), ()), points.get((name, seed), ()), cost)
            if one is not None:
                by_seed[seed] = one
        if by_seed:
            found[cost] = {
                **asdict(summarised(by_seed, chosen_by=chosen_by)),
                "by_seed": {
                    str(seed): {**asdict(one), "saving": one.value} for seed, one in by_seed.items()
                },
            }
    return found


def _beaten(grown: Sequence[Point], small: Sequence[Point]) -> bool | None:
    """Whether growth is better at the largest budget that both have finished."""
    budgets = {p.budget for p in grown} & {p.budget for p in small}
    if not budgets:
        return None
    at = max(budgets)
    loss = [next(p.loss for p in points if p.budget == at) for points in (grown, small)]
    return loss[0] < loss[1]
