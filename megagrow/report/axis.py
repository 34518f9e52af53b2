"""Axes of a chart: scale, ticks, and positions of values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.report.units import human, number_text

# Ticks of a logarithmic axis within one power of ten, coarse to fine.
_MANTISSAS: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 2, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
)


# No real value is as large, and the arithmetic of an axis stays finite below it.
_BEYOND = 1e140


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        low, high: the values at its two ends, low < high.
        log: whether it is logarithmic (then low > 0).
        ticks: the values that get a label, within [low, high].
        labels: one per tick.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def place(self, value: float) -> float:
        """The position of `value`: 0 at `low`, 1 at `high`; nan if it has none."""
        if self.log:
            if value <= 0:
                return math.nan
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(
    values: Sequence[float],
    *,
    log: bool = False,
    zero: bool = False,
    snap: bool = False,
    prefixes: bool = False,
    count: int = 5,
) -> Axis:
    """The axis that shows all finite `values`.

    Args:
        log: logarithmic, over the positive values; linear if there are none.
        zero: a linear axis begins at 0.
        snap: a linear axis ends at ticks; otherwise at the extreme values.
        prefixes: k, M, G, ... in tick labels; otherwise plain numbers.
        count: approximate number of ticks.
    """
    finite = [value for value in values if abs(value) < _BEYOND]  # not nan, not inf
    positive = [value for value in finite if value > 1 / _BEYOND]
    log = log and bool(positive)
    if log:
        finite = positive
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if zero and not log:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)) or high - low < 1 / _BEYOND:
        low, high = _widen(low, log)
    ticks = log_ticks(low, high, count) if log else linear_ticks(low, high, count)
    if snap and not log and len(ticks) > 1:
        spacing = ticks[1] - ticks[0]
        # A sliver beyond the last tick does not get another one.
        low = low if low > ticks[0] - 0.02 * spacing else ticks[0] - spacing
        high = high if high < ticks[-1] + 0.02 * spacing else ticks[-1] + spacing
        ticks = linear_ticks(low, high, count)
    elif snap and log:
        margin = (high / low) ** 0.04
        low, high = low / margin, high * margin
        ticks = log_ticks(low, high, count)
    return Axis(low, high, log, tuple(ticks), _labels(ticks, prefixes=prefixes))


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most `count` + 1."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / spacing - 1e-9)
    last = math.floor(high / spacing + 1e-9)
    return [0.0 if n == 0 else float(f"{n * spacing:.12g}") for n in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values within [low, high], spread over a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fits: list[list[float]] = []
    for mantissas in _MANTISSAS:
        every = max(1, (last - first) // count) if mantissas == (1,) else 1
        ticks = [
            float(f"{m * 10.0**power:.12g}")
            for power in range(first, last + 1, every)
            for m in mantissas
        ]
        fits.append([t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)])
    best = min(fits, key=lambda ticks: abs(len(ticks) - count))
    return best if len(best) >= 3 else linear_ticks(low, high, count)


def progress_axis(values: Sequence[float]) -> Axis:
    """The axis of tokens or FLOPs: from 0, or logarithmic if most of it would be empty."""
    log = squeezed(values)
    if log:
        # The first per cent of a run would occupy a third of the axis.
        finite = [value for value in values if math.isfinite(value)]
        values = [value for value in finite if value >= max(finite) / 2000] or finite
    return axis(values, log=log, zero=True, prefixes=True)


def squeezed(values: Sequence[float]) -> bool:
    """Whether a linear axis from 0 would squeeze half of the values into its first tenth."""
    positive = sorted(value for value in values if math.isfinite(value) and value > 0)
    return bool(positive) and positive[len(positive) // 2] < positive[-1] / 10


def _widen(value: float, log: bool) -> tuple[float, float]:
    if log:
        return value / 2, value * 2
    margin = abs(value) / 2 if abs(value) > 1 / _BEYOND else 1.0
    return value - margin, value + margin


def _labels(ticks: Sequence[float], *, prefixes: bool) -> tuple[str, ...]:
    if prefixes:
        return tuple(human(tick) for tick in ticks)
    # All ticks of an axis in one style: decimals unless one of them gets long.
    plain = [f"{tick:.6f}".rstrip("0").rstrip(".") for tick in ticks]
    if max((len(text) for text in plain), default=0) <= 7 and len(set(plain)) == len(plain):
        return tuple(text.replace("-", "−") for text in plain)
    return tuple(number_text(tick) for tick in ticks)
