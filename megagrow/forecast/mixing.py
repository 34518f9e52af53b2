"""The mixing time of a growth: how long until the grown run matches a run from scratch.

Definition.  A growth leads at T_0 tokens (all that the run has consumed) from a model of N_1
parameters to one of N_2.  Its mixing time is T - T_0, where T is the first validation after the
growth whose loss is at most F(T); F is the predicted loss of a model of the grown shape trained
from scratch on as many tokens:

    F(S) = E + A (N_1 / N_2)^a_N + (S_c / S)^a_S

A, S_c and a_S are fitted to the validations of the model before the growth (Huber loss on log L):
those after its warm-up or re-warm, with S counted from the start of the run. E, a_N and the
definition of N are those of `growth.law`; an E that is not below all of these losses is replaced by
0. With fewer than `growth.points` validations, or a growth that adds no parameters, there is no
prediction. F is valid at the peak learning rate, like the losses that it is fitted to: a decay
lowers the loss, and may end the mixing time early. The resolution is the interval between
validations.

After Bu, "Deep progressive training" (arXiv 2511.04981), whose mixing time ends where the grown run
meets the curve of the target trained from scratch; here that curve is predicted, not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megagrow.forecast.fit import Curve, Validated, fit_curve
from megagrow.forecast.scaling import ScalingLaw

_MOST = 256  # validations kept


@dataclass(frozen=True)
class Mixing:
    """The state of the measurement; part of the run's state.

    Attributes:
        validations: those of the current model, after its warm-up, oldest first.
        born: tokens at the growth that created it.
        curve: of an equal model from scratch, above `floor`; None if there is no prediction.
        floor: E.
        met: tokens from the growth until its loss reached the curve; None: not yet.
    """

    validations: tuple[Validated, ...] = ()
    born: int = 0
    curve: Curve | None = None
    floor: float = 0.0
    met: int | None = None

    def foretold(self, tokens: int) -> float | None:
        """F: the predicted loss of a model from scratch after this many tokens."""
        if self.curve is None or tokens <= 0:
            return None
        return self.curve.loss(tokens, floor=self.floor)

    def after(self, validation: Validated, *, settled: bool) -> Mixing:
        """A copy with one more validation; a second one at a step replaces the first.

        Args:
            settled: whether it is after the warm-up.
        """
        met, foretold = self.met, self.foretold(validation.tokens)
        if met is None and foretold is not None and validation.loss <= foretold:
            met = validation.tokens - self.born
        kept = self.validations
        if settled and validation.tokens > 0:
            kept = (*(one for one in kept if one.step != validation.step), validation)[-_MOST:]
        return replace(self, validations=kept, met=met)

    def grown(self, law: ScalingLaw, *, small: int, large: int, tokens: int, points: int) -> Mixing:
        """The state at the start of a grown model.

        Args:
            law: E and a_N.
            small, large: parameters before and after, by the law's definition of N.
            tokens: consumed by the run so far.
            points: minimum number of validations to fit.
        """
        losses = [one.loss for one in self.validations]
        if len(losses) < points or small >= large:
            return Mixing(born=tokens)
        floor = law.floor if law.floor < min(losses) else 0.0
        curve = fit_curve([one.tokens for one in self.validations], losses, floor=floor)
        larger = curve._replace(capacity=curve.capacity * (small / large) ** law.n_power)
        return Mixing(born=tokens, curve=larger, floor=floor)

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds."""
        return {
            "validations": [list(one) for one in self.validations],
            "born": self.born,
            "curve": None if self.curve is None else list(self.curve),
            "floor": self.floor,
            "met": self.met,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Mixing:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        curve, met = data["curve"], data["met"]
        return Mixing(
            validations=tuple(
                Validated(int(a), int(b), int(c), float(d)) for a, b, c, d in data["validations"]
            ),
            born=int(data["born"]),
            curve=None if curve is None else Curve(*map(float, curve)),
            floor=float(data["floor"]),
            met=None if met is None else int(met),
        )
