"""The most that growth can save if growing costs nothing and loses nothing.

A run that has reached a loss with the small model continues, at best, as the target would from the
same loss: it is then ahead by C_target(loss) - C_small(loss), whatever the budget.  The bound is
the greatest such lead over the budget.  Both curves are of stable phases, at the best learning rate
for each, so the bound is a guide, not a law: losses before a decay have another floor than those
after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Curve = Sequence[tuple[float, float]]  # (FLOPs, loss), ascending FLOPs


@dataclass(frozen=True)
class Bound:
    """The most that growth can save at a budget.

    Attributes:
        saving: as a fraction of the budget.
        at: FLOPs of the small model at the growth that would save this much.
        open: the small model reaches losses that the target does not reach within its curve or
            the budget, so that more may be possible; the small model alone may be better then.
    """

    saving: float
    at: float
    open: bool


def bound(small: Curve, target: Curve, *, budget: float) -> Bound | None:
    """The greatest lead between two curves; None if they have no loss in common.

    Args:
        small: of the small model.
        target: of the target.
        budget: FLOPs of a whole run; leads beyond it do not count.
    """
    ours, theirs = falling(small), falling(target)
    found: list[tuple[float, float, bool]] = []
    for flops, loss in ours:
        cost, is_open = _cost(theirs, loss)
        if cost is None or flops >= budget:
            continue
        found.append((min(cost, budget) - flops, flops, is_open or cost > budget))
    if not found:
        return None
    lead, at, _ = max(found)
    return Bound(lead / budget, at, any(is_open for _, _, is_open in found))


def falling(curve: Curve) -> list[tuple[float, float]]:
    """The monotonically falling curve nearest to a noisy one, in logarithms.

    Isotonic regression by pooling adjacent violators (Barlow et al. 1972): neighbours out of
    order are merged into one point at their mean.
    """
    pools: list[tuple[float, float, int]] = []  # sums of logarithms, and counts
    for flops, loss in curve:
        if not (math.isfinite(loss) and loss > 0 and flops > 0):
            continue
        pool = (math.log(flops), math.log(loss), 1)
        while pools and pools[-1][1] / pools[-1][2] <= pool[1] / pool[2]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return [(math.exp(c / n), math.exp(loss / n)) for c, loss, n in pools]


def _cost(curve: Curve, loss: float) -> tuple[float | None, bool]:
    """FLOPs to reach a loss by log-log interpolation, and whether that is only a lower bound.

    None if the curve starts below the loss.
    """
    for left, right in pairwise(curve):
        if left[1] >= loss >= right[1]:
            share = math.log(left[1] / loss) / math.log(left[1] / right[1])
            return left[0] * (right[0] / left[0]) ** share, False
    if curve and loss < curve[-1][1]:
        return curve[-1][0], True
    return None, False
