"""Rules that a growth leaves for the optimizer: rate factors and new blocks.

They are part of the run's state, and small: numbers per tensor, never per element. The old block of
a tensor is an arithmetic progression on each axis (or, on the first axis, a limited number of
them), so the rest needs no mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megagrow.errors import GrowthError
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.optimizers import ADAMW, OptimizerKind

Progression = tuple[int, int, int]  # start, step, count along one axis


@dataclass(frozen=True, order=True)
class Factors:
    """Factors on lr, weight decay and eps for one tensor (the `exact` policy).

    Attributes:
        lr, weight_decay, eps: for element-wise updates that do not depend on the gradient's scale
            (AdamW, Lion).
        orthogonal: on the learning rate of orthogonalised updates (Muon); weight decay is divided
            by it, and there is no eps. None: no single factor is correct.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    orthogonal: float | None = 1.0

    def times(self, other: Factors) -> Factors:
        """The product with the factors of an earlier growth."""
        known = self.orthogonal is not None and other.orthogonal is not None
        return Factors(
            self.lr * other.lr,
            self.weight_decay * other.weight_decay,
            self.eps * other.eps,
            self.orthogonal * other.orthogonal if known else None,  # type: ignore[operator]
        )


def beyond_shape(factors: Factors, old: LogicalTensor, new: LogicalTensor) -> Factors:
    """The remaining factors of a growth when rates depend on the shape.

    Args:
        factors: the total factors on the rates.
        old, new: the tensor before and after; their own rates change with the shape.
    """
    lr = new.rates.lr / old.rates.lr
    orthogonal = new.rates.orthogonal / old.rates.orthogonal
    return Factors(
        _near_one(factors.lr / lr),
        _near_one(factors.weight_decay * lr),
        _near_one(factors.eps / (new.rates.eps / old.rates.eps)),
        None if factors.orthogonal is None else _near_one(factors.orthogonal / orthogonal),
    )


def _near_one(factor: float) -> float:
    """The factor, or 1 if it differs only by rounding, so that tensors share a group."""
    return 1.0 if abs(factor - 1.0) < 1e-12 else factor


@dataclass(frozen=True)
class YoungBlocks:
    """The new blocks of one tensor after a growth.

    Attributes:
        kept: per axis the elements of the old block; None if the whole tensor is new.
        born: optimizer step at the growth; bias correction of the new blocks counts from it.
        peak: multiple of the learning rate that they warm up to.
        rewarm: number of steps of the warm-up.
        inside: the new blocks of an earlier growth, inside the old block, which keep their own step
            count. None if the whole old block uses the optimizer's step count.
        rows: the old elements of the first axis if they are more than one progression, in order;
            `kept` then has all of every axis.
    """

    kept: tuple[Progression, ...] | None
    born: int
    peak: float
    rewarm: int
    inside: YoungBlocks | None = None
    rows: tuple[Progression, ...] = ()

    def lr_factor(self, step: int) -> float:
        """The multiple of the learning rate for update number `step` (from 1)."""
        age = step - self.born
        if self.rewarm == 0:
            return self.peak
        return 1.0 + (self.peak - 1.0) * min(age / self.rewarm, 1.0)

    def matters(self, step: int, *, betas: tuple[float, float]) -> bool:
        """Whether AdamW's bias correction still makes 1 % of an update or more."""
        age = step - self.born
        if age <= 0:
            return True
        ratio = (1 - betas[0] ** age) / math.sqrt(1 - betas[1] ** age)
        return abs(ratio - 1) >= 0.01 or (
            self.inside is not None and self.inside.matters(step, betas=betas)
        )

    @staticmethod
    def from_json(item: Mapping[str, Any]) -> YoungBlocks:
        """Read the output of `dataclasses.asdict`; earlier versions had no `inside` or `rows`."""
        kept, inside = item["kept"], item.get("inside")
        return YoungBlocks(
            None if kept is None else tuple((int(a), int(b), int(c)) for a, b, c in kept),
            int(item["born"]),
            float(item["peak"]),
            int(item["rewarm"]),
            None if inside is None else YoungBlocks.from_json(inside),
            tuple((int(a), int(b), int(c)) for a, b, c in item.get("rows", ())),
        )


@dataclass(frozen=True)
class OptimizerRules:
    """All rules in force, by tensor name."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    young: Mapping[str, YoungBlocks] = field(default_factory=dict)

    def factors_of(self, name: str) -> Factors:
        """The factors of a tensor; all 1 if no growth set any."""
        return self.factors.get(name, Factors())

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds; `from_json` is its inverse."""
        return {
            "factors": {name: asdict(f) for name, f in self.factors.items()},
            "young": {name: asdict(y) for name, y in self.young.items()},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> OptimizerRules:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        young = {name: YoungBlocks.from_json(item) for name, item in data["young"].items()}
        factors = {
            name: Factors(
                float(f["lr"]),
                float(f["weight_decay"]),
                float(f["eps"]),
                # Not in the files of earlier versions, which did not support Muon.
                None if f.get("orthogonal", 1.0) is None else float(f.get("orthogonal", 1.0)),
            )
            for name, f in data["factors"].items()
        }
        return OptimizerRules(factors, young)


GroupKey = tuple[bool, float, float, float, bool]
# The group of frozen tensors, which the optimizer does not have: no decay, no rate.
FROZEN: GroupKey = (True, 0.0, 0.0, 0.0, False)


def group_keys(
    catalog: Catalog, rules: OptimizerRules, optimizer: OptimizerKind = ADAMW
) -> dict[str, GroupKey]:
    """The optimizer's parameter group of every tensor, from its rates and the rules of growths.

    A key is (no decay, lr, decay and eps factors, whether its updates are orthogonalised). Groups
    are in the order of their keys, those with weight decay first. Frozen tensors have the key
    `FROZEN`.

    Args:
        catalog: the tensors.
        rules: the rules of all growths so far.
        optimizer: the optimizer that updates them.

    Raises:
        GrowthError: no single learning rate of Muon satisfies the rules.
    """
    keys = {}
    for tensor in catalog:
        if tensor.training == "frozen":
            keys[tensor.name] = FROZEN
            continue
        f = rules.factors_of(tensor.name)
        own = tensor.rates
        orthogonal = optimizer.orthogonalises(tensor)
        if not orthogonal:
            rates = (f.lr * own.lr, f.weight_decay / own.lr, f.eps * own.eps)
        elif f.orthogonal is not None:
            rate = f.orthogonal * own.orthogonal
            rates = (rate, 1.0 / rate, 1.0)
        else:
            raise GrowthError(
                "grow.state_policy: 'exact' does not go with optimizer.name "
                f"{optimizer.name} here: the matrices of {tensor.name} would need a "
                "learning rate each",
                fix="grow all axes of the model by one factor, or set grow.state_policy to "
                "sparkling",
            )
        keys[tensor.name] = (not tensor.decay, *rates, orthogonal)
    return keys
