"""Search for the best values of some settings; trains nothing itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megagrow.savings.config import SweepConfig

Point = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """The state of a sweep.

    Attributes:
        missing: points whose loss is needed next; empty once the search is over.
        best: the best point; None before the search is over.
    """

    missing: Sequence[Point]
    best: Point | None = None


def search(
    sweep: SweepConfig, own: Mapping[str, Any], loss_of: Callable[[Point], float | None]
) -> Search:
    """Advance a sweep as far as the known losses allow.

    Args:
        sweep: the settings and their values.
        own: the point from which a search by coordinate starts.
        loss_of: the loss of a point; None if not known yet, infinite if a run diverged.
    """
    if sweep.by == "grid":
        names = sweep.names
        rows = itertools.product(*(sweep.values[name] for name in names))
        return _best([dict(zip(names, row, strict=True)) for row in rows], loss_of)
    best = {name: own[name] for name in sweep.names}
    for _ in range(sweep.rounds):
        before = best
        for name in sweep.names:
            found = _best([{**best, name: value} for value in sweep.values[name]], loss_of)
            if found.best is None:
                return found
            best = found.best
        if best == before:
            break
    return Search((), best)


def _best(points: Sequence[Point], loss_of: Callable[[Point], float | None]) -> Search:
    losses = [loss_of(point) for point in points]
    missing = [point for point, loss in zip(points, losses, strict=True) if loss is None]
    if missing:
        return Search(missing)
    known = [(loss, at) for at, loss in enumerate(losses) if loss is not None]
    return Search((), points[min(known)[1]])


def edges(sweep: SweepConfig, best: Mapping[str, Any], *, key: str) -> list[str]:
    """The sweeps to widen, because the best value is the smallest or the greatest tried.

    Values without an order, such as names, have no edge.
    """
    found = []
    for name, values in sweep.values.items():
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            continue
        sides = [side for side, edge in (("below", min(values)), ("above", max(values)))
                 if best[name] == edge]  # fmt: skip
        if sides:
            found.append(f"edge: widen {key}.{name} {' and '.join(sides)} {best[name]:g}")
    return found
