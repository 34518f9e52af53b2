"""What a growth operator is: blocks that make each grown tensor of a smaller model's.

An operator states two numbers for every block: how its parameters are scaled
(``param``), and which multiple of the old gradient the grown model's gradient
will be there (``grad``).  Everything about optimizer state follows from the
second (the slot law), so operators know nothing of optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.statemap import AxisMap, Copy, Fill


@dataclass(frozen=True)
class Block:
    """One block of a grown tensor.

    Attributes:
        source: the small model's tensor that it is copied from.
        axes: which elements, axis by axis.
        param: grown parameter = param * old parameter.
        grad: gradient of the grown model = grad * old gradient, or None where the
            operator states nothing (it does not keep the loss).
        new: whether the block is additional capacity, not the old block in its place.
    """

    source: str
    axes: tuple[AxisMap, ...]
    param: float = 1.0
    grad: float | None = None
    new: bool = False

    def scaled(self, coefficient: float) -> Copy:
        """The block as a copy of some slot."""
        return Copy(self.source, self.axes, coefficient)


class Operator(Protocol):
    """One way to grow a model.

    Attributes:
        name: as written in a configuration.
        summary: one line on what it does.
        keeps: what is the same right after the growth.
        breaker: how exact copies come to differ (the symmetry law).
        source: paper or report it comes from.
        policies: names of the state policies that make sense; the first is the default.
    """

    name: str
    summary: str
    keeps: str
    breaker: str
    source: str
    policies: Sequence[str]

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """The grown model's configuration."""
        ...

    def blocks(self, tensor: LogicalTensor, small: Catalog) -> tuple[Block, ...]:
        """The blocks of one tensor of the grown model; they do not overlap."""
        ...

    def fill(self, tensor: LogicalTensor) -> Fill:
        """What parameters that no block covers become."""
        ...


def same(n: int) -> AxisMap:
    """An axis that does not grow."""
    return AxisMap(0, 1, 0, 1, n)


def tiled(n: int, factor: int) -> list[AxisMap]:
    """Copies laid end to end: a b -> a b a b."""
    return [AxisMap(c * n, 1, 0, 1, n) for c in range(factor)]


def repeated(n: int, factor: int) -> list[AxisMap]:
    """Copies interleaved: a b -> a a b b.

    A copy stays beside its source, hence on the tensor-parallel rank that holds it.
    """
    return [AxisMap(c, factor, 0, 1, n) for c in range(factor)]


def growth_factor(large: int, small: int, what: str) -> int:
    """How many times larger an axis became; raises GrowthError if not a whole number."""
    factor, rest = divmod(large, small)
    if rest or factor < 1:
        raise GrowthError(
            f"{what} cannot grow from {small} to {large}",
            expected=f"a multiple of {small}",
        )
    return factor
