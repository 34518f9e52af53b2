"""Fit L(N, S) to runs: Huber loss on log L, several starts, bootstrap intervals.

The form is the one of `scaling`, written as log L = logsumexp(e, a - a_N log N, b - a_S log S), as
Hoffmann et al. (arXiv 2203.15556, section 3.3) fit it.  Only steps at the peak learning rate count:
warm-up steps are not representative, and prefixes of a run that decays later are biased.
Neighbouring steps of a run share their noise, so points are means over bins of equal width in log
S, and the bootstrap resamples bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy

from megagrow.errors import DataError
from megagrow.forecast.scaling import ScalingLaw, Unit

Floats = npt.NDArray[np.float64]
# In log L. Hoffmann et al. use 1e-3 for final losses; means over bins scatter by more, and with a
# delta far below the scatter the Huber loss becomes L1, whose kinks slow the solver down.
HUBER = 1e-2
_LOW_FLOOR = -30.0  # log of a floor that is effectively 0
_STARTS = tuple(
    (e, a_n, a_s) for e in (-1.0, 0.5) for a_n in (0.08, 0.3) for a_s in (0.3, 0.8)
)  # fmt: skip


@dataclass(frozen=True)
class RunPoints:
    """One model's losses at the peak learning rate.

    Attributes:
        n: parameters.
        s: steps or tokens, increasing, [points].
        loss: nats per token, [points].
    """

    n: float
    s: Floats
    loss: Floats


@dataclass(frozen=True)
class Fit:
    """A fitted law, and the laws fitted to resampled data.

    Attributes:
        law: the fit to all points.
        samples: one law per bootstrap sample.
        points: number of points fitted.
        error: root mean square of the residuals of log L.
    """

    law: ScalingLaw
    samples: tuple[ScalingLaw, ...]
    points: int
    error: float

    def interval(self, attribute: str) -> tuple[float, float]:
        """Central 95 % of an attribute of the law (`n_power`, say) over the samples."""
        low, high = np.quantile([getattr(law, attribute) for law in self.samples], (0.025, 0.975))
        return float(low), float(high)


def binned(n: float, s: Sequence[float], loss: Sequence[float], *, bins: int = 24) -> RunPoints:
    """Means over bins of equal width in log S; empty bins are left out.

    Args:
        n: parameters.
        s: steps or tokens of each loss, positive.
        loss: as many losses; non-finite ones are dropped.
        bins: maximum number of points.
    """
    across, values = np.asarray(s, np.float64), np.asarray(loss, np.float64)
    fine = np.isfinite(values) & (across > 0)
    across, values = across[fine], values[fine]
    if len(across) == 0:
        return RunPoints(n, across, values)
    edges = np.linspace(math.log(across[0]), math.log(across[-1]) + 1e-9, bins + 1)
    number = np.digitize(np.log(across), edges)
    groups = [number == i for i in np.unique(number)]
    return RunPoints(
        n,
        np.array([math.exp(np.log(across[g]).mean()) for g in groups]),
        np.array([values[g].mean() for g in groups]),
    )


def fit_law(
    runs: Sequence[RunPoints],
    *,
    unit: Unit,
    embeddings: bool = True,
    floor: bool = True,
    bootstrap: int = 200,
    seed: int = 0,
) -> Fit:
    """Fit a law to runs of several sizes.

    Args:
        runs: one or more per size.
        unit: what their `s` counts.
        embeddings: whether their `n` counts embeddings.
        floor: whether E is fitted; otherwise it is 0, as in Kaplan et al.
        bootstrap: number of resampled fits.
        seed: of the resampling.

    Raises:
        DataError: fewer sizes or points than the form needs.
    """
    sizes = sorted({run.n for run in runs})
    needed = 3 if floor else 2
    count = sum(len(run.s) for run in runs)
    if len(sizes) < needed or count < 4 * (4 + floor):
        raise DataError(
            "the runs do not determine a scaling law",
            found=f"{len(sizes)} sizes, {count} points at the peak learning rate",
            expected=f"at least {needed} sizes (4 are better) and {4 * (4 + floor)} points",
            fix="give runs of more sizes, or longer ones"
            + ("" if not floor else "; or leave out E: --no-floor needs one size less"),
        )
    n = np.concatenate([np.full(len(run.s), run.n) for run in runs])
    s = np.concatenate([run.s for run in runs])
    loss = np.concatenate([run.loss for run in runs])
    logs = np.log(n), np.log(s), np.log(loss)
    found = [_solve(logs, _start(logs, *one), floor=floor) for one in _STARTS]
    best = min(found, key=lambda one: one[1])[0]
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(bootstrap):
        drawn = random.integers(0, len(n), len(n))
        if len(set(n[drawn])) < needed:
            continue
        part = tuple(values[drawn] for values in logs)
        samples.append(_law(_solve(part, best, floor=floor)[0], unit, embeddings))
    residuals = _predict(best, logs[0], logs[1]) - logs[2]
    return Fit(
        _law(best, unit, embeddings),
        tuple(samples),
        points=len(n),
        error=float(np.sqrt(np.mean(residuals**2))),
    )


def _start(logs: tuple[Floats, ...], e: float, a_n: float, a_s: float) -> Floats:
    """An initial guess: at the middle of the data both terms are a third of the mean loss."""
    level = float(logs[2].mean()) - math.log(3)
    a, b = level + a_n * logs[0].mean(), level + a_s * logs[1].mean()
    return np.array([min(e, level), a, math.log(a_n), b, math.log(a_s)])


def _terms(x: Floats, log_n: Floats, log_s: Floats) -> Floats:
    """Logs of the three summands, [3, points]."""
    e, a, log_a_n, b, log_a_s = x
    return np.stack(
        [np.full_like(log_n, e), a - np.exp(log_a_n) * log_n, b - np.exp(log_a_s) * log_s]
    )


def _predict(x: Floats, log_n: Floats, log_s: Floats) -> Floats:
    result: Floats = scipy.special.logsumexp(_terms(x, log_n, log_s), axis=0)
    return result


def _solve(logs: tuple[Floats, ...], start: Floats, *, floor: bool) -> tuple[Floats, float]:
    """(parameters, cost) from one start."""
    log_n, log_s, log_loss = logs
    fixed = np.array([] if floor else [_LOW_FLOOR])

    def residuals(free: Floats) -> Floats:
        return _predict(np.concatenate([fixed, free]), log_n, log_s) - log_loss

    def jacobian(free: Floats) -> Floats:
        x = np.concatenate([fixed, free])
        terms = _terms(x, log_n, log_s)
        shares = np.exp(terms - scipy.special.logsumexp(terms, axis=0))
        columns = np.stack(
            [
                shares[0],
                shares[1],
                -shares[1] * np.exp(x[2]) * log_n,
                shares[2],
                -shares[2] * np.exp(x[4]) * log_s,
            ],
            axis=1,
        )
        return columns[:, len(fixed) :]

    result = scipy.optimize.least_squares(
        residuals,
        start[len(fixed) :],
        jacobian,
        loss="huber",
        f_scale=HUBER,
        x_scale="jac",
        max_nfev=1000,
    )
    return np.concatenate([fixed, result.x]), float(result.cost)


def _law(x: Floats, unit: Unit, embeddings: bool) -> ScalingLaw:
    e, a, log_a_n, b, log_a_s = (float(value) for value in x)
    a_n, a_s = math.exp(log_a_n), math.exp(log_a_s)
    floor = 0.0 if e <= _LOW_FLOOR else math.exp(e)
    return ScalingLaw(
        "fitted", floor, math.exp(a / a_n), a_n, math.exp(b / a_s), a_s, unit, embeddings
    )


class Curve(NamedTuple):
    """One model's L(S) above a known floor: capacity + (s_scale / S)^s_power."""

    capacity: float
    s_scale: float
    s_power: float

    def loss(self, s: float, *, floor: float) -> float:
        """The loss after S."""
        return float(floor + self.capacity + (self.s_scale / s) ** self.s_power)

    def gain(self, rest: float) -> float:
        """-dL/dS at a loss of `rest` above the model's limit; 0 at the limit."""
        if rest <= 0:
            return 0.0
        return float(self.s_power * rest ** (1 + 1 / self.s_power) / self.s_scale)


def fit_curve(s: Sequence[float], loss: Sequence[float], *, floor: float) -> Curve:
    """Fit one model's curve above a floor: Huber on log L, from several starts.

    Args:
        s: tokens or steps, positive, increasing.
        loss: as many losses.
        floor: E, below all losses; if one is not above it, 0 is used.
    """
    across = np.log(np.asarray(s, np.float64))
    level = np.asarray(loss, np.float64)
    floor = floor if floor < level.min() else 0.0
    log_loss = np.log(level)

    def residuals(x: Floats) -> Floats:
        predicted: Floats = np.log(floor + np.exp(x[0]) + np.exp(x[1] - np.exp(x[2]) * across))
        return predicted - log_loss

    best: tuple[float, Floats] | None = None
    above = math.log(level.min() - floor)
    for share, power in ((0.2, 0.3), (0.6, 0.3), (0.2, 0.8), (0.6, 0.8)):
        begin = math.log1p(-share) + above + power * across[-1]
        result = scipy.optimize.least_squares(
            residuals,
            [math.log(share) + above, begin, math.log(power)],
            loss="huber",
            f_scale=HUBER,
            bounds=([-30.0, -200.0, math.log(0.02)], [10.0, 200.0, math.log(3.0)]),
            max_nfev=300,
        )
        if best is None or result.cost < best[0]:
            best = float(result.cost), result.x
    assert best is not None
    a, b, log_power = (float(value) for value in best[1])
    power = math.exp(log_power)
    return Curve(math.exp(a), math.exp(b / power), power)


class Validated(NamedTuple):
    """One validation of the stage."""

    step: int
    tokens: int
    flops: int
    loss: float
