"""Rules that end a growth stage from what validation has shown so far.

`slope`: d log L / d log C of the validation loss, by least squares over the last few validations
(Shen et al., arXiv 2203.06211, smooth over five), against a threshold. Theirs are -0.0575 for
depth, -0.0475 for width and -0.03 for both before a growth, -0.052 for the end of the run.  C
counts from the start of the run.

`marginal`: a curve L(S) = E + A + (S_c / S)^a_S is fitted to the stage's validations so far, with E
and a_N from a scaling law; the larger model would have A_2 = A (N_1 / N_2)^a_N and the same S_c.
The stage ends as soon as the larger model would reduce the loss more per FLOP at this loss. A grown
model did not start from scratch: its S counts from where the larger curve reaches the loss of its
first validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from megagrow.forecast.fit import Curve, Validated, fit_curve
from megagrow.forecast.scaling import ScalingLaw

_MOST = 256  # validations kept; a stage rarely has as many


@dataclass(frozen=True)
class Seen:
    """The state of the rules: part of the run's state, so that a resumed run decides the same.

    Attributes:
        validations: those of this growth stage after its warm-up, oldest first.
        curve: the last fit of `marginal`, in this stage or the one before it.
        credit: tokens that this stage's model would have needed from scratch to reach its starting
            loss.
    """

    validations: tuple[Validated, ...] = ()
    curve: Curve | None = None
    credit: float = 0.0

    def after(self, validation: Validated) -> Seen:
        """A copy with one more validation."""
        return replace(self, validations=(*self.validations, validation)[-_MOST:])

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds."""
        return {
            "validations": [list(one) for one in self.validations],
            "curve": None if self.curve is None else list(self.curve),
            "credit": self.credit,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Seen:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        curve = data["curve"]
        return Seen(
            validations=tuple(
                Validated(int(a), int(b), int(c), float(d)) for a, b, c, d in data["validations"]
            ),
            curve=None if curve is None else Curve(*map(float, curve)),
            credit=float(data["credit"]),
        )


@dataclass(frozen=True)
class Decision:
    """A rule's decision after a validation.

    Attributes:
        end: whether the stage ends here.
        inputs: the quantities that it depends on, for the log.
        seen: the updated state.
    """

    end: bool
    inputs: dict[str, float]
    seen: Seen


def slope(seen: Seen, *, threshold: float, points: int) -> Decision | None:
    """End if the slope is above (flatter than) the threshold; None with too few points.

    Args:
        seen: the stage's validations.
        threshold: negative.
        points: number of validations that the slope is computed over.
    """
    last = seen.validations[-points:]
    if len(last) < points or min(one.flops for one in last) <= 0:
        return None
    found = _slope([one.flops for one in last], [one.loss for one in last])
    inputs = {"slope": found, "threshold": threshold, "points": float(points)}
    return Decision(found > threshold, inputs, seen)


def _slope(compute: Sequence[float], loss: Sequence[float]) -> float:
    x, y = np.log(np.asarray(compute, np.float64)), np.log(np.asarray(loss, np.float64))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


class Sizes(NamedTuple):
    """What `marginal` needs to know about the two models: parameters and FLOPs per token."""

    small: int
    large: int
    small_flops: float
    large_flops: float


def marginal(seen: Seen, law: ScalingLaw, sizes: Sizes, *, points: int) -> Decision | None:
    """End if the larger model is predicted to gain more per FLOP; None with too few points.

    Args:
        seen: the stage's validations.
        law: gives E and a_N; its other constants are the fit's initial values.
        sizes: before and after the growth.
        points: the minimum number of validations to fit.
    """
    if len(seen.validations) < points:
        return None
    first = seen.validations[0].tokens
    if seen.curve is not None and seen.credit == 0.0 and len(seen.validations) == points:
        seen = _with_credit(seen, law, sizes)
    s = [one.tokens - (first if seen.credit else 0) + seen.credit for one in seen.validations]
    curve = fit_curve(s, [one.loss for one in seen.validations], floor=law.floor)
    large = curve.capacity * (sizes.small / sizes.large) ** law.n_power
    loss = curve.loss(s[-1], floor=law.floor)
    gains = [
        curve.gain(loss - law.floor - rest) / flops
        for rest, flops in ((curve.capacity, sizes.small_flops), (large, sizes.large_flops))
    ]
    inputs = {
        "loss": loss,
        "capacity": curve.capacity,
        "capacity_after": large,
        "s_scale": curve.s_scale,
        "s_power": curve.s_power,
        "gain_per_flop": gains[0],
        "gain_per_flop_after": gains[1],
        "points": float(len(seen.validations)),
    }
    return Decision(gains[1] >= gains[0], inputs, replace(seen, curve=curve))


def _with_credit(seen: Seen, law: ScalingLaw, sizes: Sizes) -> Seen:
    """Place a grown model's start on the curve fitted in the previous stage.

    `seen.curve` has this model's capacity term: `next_stage` has scaled it.
    """
    assert seen.curve is not None
    rest = seen.validations[0].loss - law.floor - seen.curve.capacity
    if rest <= 0:
        return seen
    return replace(seen, credit=seen.curve.s_scale * rest ** (-1 / seen.curve.s_power))


def next_stage(seen: Seen, law: ScalingLaw, *, small: int, large: int) -> Seen:
    """A rule's state at the start of the next stage: the curve, scaled to the new size."""
    curve = seen.curve
    if curve is not None:
        scale = math.exp(law.n_power * math.log(small / large))
        curve = curve._replace(capacity=curve.capacity * scale)
    return Seen(curve=curve)
