"""`width_random`: new units that are gradually unmasked, and the ramp that does so.

"Masked Structural Growth" (Yao et al., arXiv 2305.02869): the new units start at random, under a
mask that is 0 at the growth and rises to 1. Their outputs are weighted by the mask, in sums and in
the statistics of norms, so at the growth the model computes the same as the small one, whatever
their values. During a ramp the model has masks (`megagrow.models.common.masks`); afterwards it is a
plain model.

Old units keep their indices and new ones follow them, except that a group's old query heads are its
last, next to the key and the value that they use. So any larger size is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megagrow.errors import GrowthError
from megagrow.growth.operator import GrowthBlock, Operator, require_no_less, require_same, same
from megagrow.growth.operators.width import GROWING, WIDTH_SIZES
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap, Fill


@dataclass(frozen=True)
class Ramp:
    """The ramp of new units; part of the run's state until it ends.

    Attributes:
        old: the number of old units by axis (`embed`, `kv_group`, `query`, `ffn`).
        born: step of the run at the growth.
        steps: number of steps after which new units have their full weight.
    """

    old: Mapping[str, int]
    born: int
    steps: int

    def progress(self, step: int) -> float:
        """The weight of the new units at a step of the run, from 0 at the growth to 1."""
        return min((step - self.born) / self.steps, 1.0)

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds; `from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Ramp:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        old = {axis: int(data["old"][axis]) for axis in GROWING}
        ramp = Ramp(old, int(data["born"]), int(data["steps"]))
        if ramp.steps < 1 or min(old.values()) < 1:
            raise ValueError("a ramp needs at least one step and one old unit an axis")
        return ramp


def make_ramp(small: Catalog, target: Catalog, *, steps: int) -> Ramp | None:
    """The ramp of a growth at step 0; None if it has no steps, or no axis grows."""
    old, new = _units(small), _units(target)
    return None if steps == 0 or old == new else Ramp(old, 0, steps)


def _units(catalog: Catalog) -> dict[str, int]:
    return {
        axis: n
        for tensor in catalog
        for axis, n in zip(tensor.axes, tensor.shape, strict=True)
        if axis in GROWING
    }


def beside(tensor: LogicalTensor, old: LogicalTensor) -> tuple[AxisMap, ...]:
    """The indices of a tensor's old elements when new units are added to the old ones.

    Raises:
        GrowthError: an axis shrinks, or is not a width axis.
    """
    axes = []
    for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
        if meaning not in (*GROWING, "projection"):
            require_same(tensor.name, meaning, n, large)
        # Queries, and the key and the value after them, are last on their axis.
        last = meaning in ("query", "projection")
        if last and large < n:
            raise GrowthError(
                f"{tensor.name}: fewer query heads to a key/value head than before",
                expected="as many or more, since old ones stay with their key/value head",
                fix="raise heads with kv_heads in grow.target, or set grow.operator to kv_groups",
            )
        require_no_less(tensor.name, meaning, n, large)
        axes.append(AxisMap(large - n, 1, 0, 1, n) if last else same(n))
    return tuple(axes)


@dataclass(frozen=True, kw_only=True)
class WidthRandom(Operator):
    """Freshly initialised units in addition to the old ones."""

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """The old elements; with the mask at 0 the grown model has the old gradients there."""
        return (GrowthBlock(tensor.name, beside(tensor, small[tensor.name]), grad=1.0),)

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """New units are initialised as at the start of a run."""
        return "fresh"


WIDTH_RANDOM = WidthRandom(
    name="width_random",
    summary="fresh units beside the old ones, under a mask that climbs from 0 to 1",
    keeps="loss",
    breaker="no copies are made",
    source="MSG, Yao et al., arXiv 2305.02869",
    policies=("kept", "sparkling", "copy", "reset"),
    sizes=WIDTH_SIZES,
    ramp=250,
    any_size=True,
    handles=frozenset({"norm after"}),
)
