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
    """One way to grow a model; a frozen dataclass whose fields describe it."""

    @property
    def name(self) -> str:
        """As written in a configuration."""
        ...

    @property
    def summary(self) -> str:
        """One line on what it does."""
        ...

    @property
    def keeps(self) -> str:
        """What is the same right after the growth: ``loss`` or ``nothing``."""
        ...

    @property
    def breaker(self) -> str:
        """How exact copies come to differ (the symmetry law)."""
        ...

    @property
    def source(self) -> str:
        """Paper or report that it comes from."""
        ...

    @property
    def policies(self) -> Sequence[str]:
        """Names of the state policies that make sense; the first is the default."""
        ...

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
