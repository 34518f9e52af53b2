"""Rules that a growth leaves to the optimizer: rate factors and young blocks.

They are part of the run's state, and small: numbers per tensor, never per
element.  Inside one matrix the old block is an arithmetic progression on each
axis, so "the rest" needs no mask.
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
    """Multiples of lr, weight decay and eps for one tensor (the `exact` policy).

    Attributes:
        lr, weight_decay, eps: where the update does not depend on the gradient's scale, element
            by element (AdamW, Lion).
        orthogonal: of the learning rate where the update is an orthogonalised matrix (Muon);
            weight decay is divided by it, and there is no eps.  None: no one number would do.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    orthogonal: float | None = 1.0

    def times(self, other: Factors) -> Factors:
        """Factors of one growth upon those of an earlier one."""
        known = self.orthogonal is not None and other.orthogonal is not None
        return Factors(
            self.lr * other.lr,
            self.weight_decay * other.weight_decay,
            self.eps * other.eps,
            self.orthogonal * other.orthogonal if known else None,  # type: ignore[operator]
        )


def beyond_shape(factors: Factors, old: LogicalTensor, new: LogicalTensor) -> Factors:
    """What a growth leaves of the factors that it asks for, where shapes have rates of their own.

    Args:
        factors: what the rates must be multiplied by, all in all.
        old, new: the tensor before and after; their own rates change by themselves.
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
    """The factor, or 1 where rounding alone keeps it from that: tensors then share a group."""
    return 1.0 if abs(factor - 1.0) < 1e-12 else factor


@dataclass(frozen=True)
class YoungBlocks:
    """The new blocks of one tensor, since a growth.

    Attributes:
        kept: per axis the elements of the old block; None where all of the tensor is new.
        born: optimizer step at the growth; bias correction of the new blocks counts from it.
        peak: multiple of the learning rate that they climb to.
        rewarm: over how many steps.
        inside: the new blocks of an earlier growth, inside the old block; their own step count
            goes on.  None where all of the old block counts the optimizer's steps.
    """

    kept: tuple[Progression, ...] | None
    born: int
    peak: float
    rewarm: int
    inside: YoungBlocks | None = None

    def lr_factor(self, step: int) -> float:
        """The multiple of the learning rate for the update that makes step `step` (from 1)."""
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
        """Read what `dataclasses.asdict` made; earlier versions knew no `inside`."""
        kept, inside = item["kept"], item.get("inside")
        return YoungBlocks(
            None if kept is None else tuple((int(a), int(b), int(c)) for a, b, c in kept),
            int(item["born"]),
            float(item["peak"]),
            int(item["rewarm"]),
            None if inside is None else YoungBlocks.from_json(inside),
        )


@dataclass(frozen=True)
class OptimizerRules:
    """All rules in force, by tensor name."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    young: Mapping[str, YoungBlocks] = field(default_factory=dict)

    def factors_of(self, name: str) -> Factors:
        """The factors of a tensor; all 1 where no growth set any."""
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
                # Not in the files of earlier versions, which knew no Muon.
                None if f.get("orthogonal", 1.0) is None else float(f.get("orthogonal", 1.0)),
            )
            for name, f in data["factors"].items()
        }
        return OptimizerRules(factors, young)


GroupKey = tuple[bool, float, float, float, bool]


def group_keys(
    catalog: Catalog, rules: OptimizerRules, optimizer: OptimizerKind = ADAMW
) -> dict[str, GroupKey]:
    """The optimizer's parameter group of every tensor, by its own rates and what growths left.

    (no decay, lr, decay and eps factors, whether its updates are orthogonalised).  Groups are
    laid out in the order of their keys, those with weight decay first.

    Args:
        catalog: the tensors.
        rules: what growths left.
        optimizer: that steps them.

    Raises:
        GrowthError: no one learning rate of Muon follows the rules.
    """
    keys = {}
    for tensor in catalog:
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
                f"grow.state_policy: 'exact' does not go with optimizer.name muon here: the "
                f"matrices of {tensor.name} would need a learning rate each",
                fix="grow all axes of the model by one factor, or set grow.state_policy to "
                "sparkling",
            )
        keys[tensor.name] = (not tensor.decay, *rates, orthogonal)
    return keys
