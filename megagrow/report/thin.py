"""Curves of any length in bounded memory: neighbouring steps are merged online.

A run of a million steps cannot be drawn step by step, and need not be kept so. Once there are too
many groups, pairs of neighbours are merged: each group keeps the steps that a plot must show (the
lowest and the highest loss, the largest gradient) and the means over all its steps. Groups do not
extend across the end of a growth stage, where curves jump.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from megagrow.report.step_facts import AVERAGED, StepFacts

T = TypeVar("T")


@dataclass(slots=True)
class _Group:
    """Neighbouring steps of one stage; sums and counts are over finite values."""

    count: int
    low: StepFacts
    high: StepFacts
    steepest: StepFacts
    last: StepFacts
    sums: list[float]
    counts: list[int]

    @staticmethod
    def of(step: StepFacts) -> _Group:
        values = [getattr(step, name) for name in AVERAGED]
        finite = [math.isfinite(value) for value in values]
        sums = [value if fine else 0.0 for value, fine in zip(values, finite, strict=True)]
        return _Group(1, step, step, step, step, sums, [int(fine) for fine in finite])

    def takes(self, other: _Group) -> None:
        """Merge the following group into this one."""
        self.count += other.count
        self.low = min(self.low, other.low, key=_by_loss)
        self.high = max(self.high, other.high, key=_by_loss)
        self.steepest = max(self.steepest, other.steepest, key=_steep)
        self.last = other.last
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def kept(self) -> list[StepFacts]:
        found = {step.step: step for step in (self.low, self.high, self.steepest)}
        return [found[number] for number in sorted(found)]

    def mean(self) -> StepFacts:
        if self.count == 1:
            return self.last
        means = (s / n if n else math.nan for s, n in zip(self.sums, self.counts, strict=True))
        values = dict(zip(AVERAGED, means, strict=True))
        return StepFacts(step=self.last.step, growth_stage=self.last.growth_stage, **values)


class Steps:
    """The steps of a run, merged into groups if there are too many.

    Args:
        most: maximum number of groups; None keeps every step.

    Attributes:
        size: maximum steps per group; 1 if every step is kept.
        count: number of steps added.
        last: the last step.
        not_finite: number of steps with a non-finite loss.
        first_not_finite: step number of the first of them.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most, self._groups = most, list[_Group]()
        self.size, self.count = 1, 0
        self.last: StepFacts | None = None
        self.not_finite = 0
        self.first_not_finite: int | None = None

    def add(self, step: StepFacts) -> None:
        """Append a step; if it has the number of the last one, replace that."""
        groups, again = self._groups, self.last is not None and self.last.step == step.step
        self.last = step
        if again and groups[-1].count == 1:
            groups.pop()
        else:
            self.count += 1
        if not math.isfinite(step.loss):
            self.not_finite += 1
            if self.first_not_finite is None:
                self.first_not_finite = step.step
        self._append(_Group.of(step))
        if self._most is not None and len(groups) > self._most:
            self.size *= 2
            self._groups = []
            for group in groups:
                self._append(group)

    def _append(self, group: _Group) -> None:
        last = self._groups[-1] if self._groups else None
        fits = last is not None and last.count + group.count <= self.size
        if last is not None and fits and last.last.stage == group.last.stage:
            last.takes(group)
        else:
            self._groups.append(group)

    def kept(self) -> tuple[StepFacts, ...]:
        """Actual steps: all, or from each group those with extreme loss or gradient."""
        return tuple(step for group in self._groups for step in group.kept())

    def means(self) -> tuple[StepFacts, ...]:
        """One per group, with the means of its values and the step number of its last step."""
        return tuple(group.mean() for group in self._groups)


class EveryNth(Generic[T]):
    """Items of a long sequence: all, or every n-th and the last.

    Args:
        most: maximum number of items; None keeps all.

    Attributes:
        size: the n.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most, self._held = most, list[T]()
        self.size, self.count = 1, 0
        self.last: T | None = None

    def add(self, item: T) -> None:
        """Append an item."""
        if self.count % self.size == 0:
            self._held.append(item)
        self.count += 1
        self.last = item
        if self._most is not None and len(self._held) > self._most:
            self._held = self._held[::2]
            self.size *= 2

    def replace_last(self, item: T) -> None:
        """Replace the last item."""
        if self._held and self._held[-1] is self.last:
            self._held[-1] = item
        self.last = item

    def kept(self) -> tuple[T, ...]:
        """The items in order, including the last one."""
        if self.last is None or self._held[-1] is self.last:
            return tuple(self._held)
        return (*self._held, self.last)


def _by_loss(step: StepFacts) -> tuple[bool, float]:
    """Non-finite losses sort last: they are a gap in the curve, which must be visible."""
    return (False, step.loss) if math.isfinite(step.loss) else (True, 0.0)


def _steep(step: StepFacts) -> float:
    return step.grad_norm if math.isfinite(step.grad_norm) else -math.inf
