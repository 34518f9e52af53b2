"""Several operators in one growth: their blocks, composed where they meet.

The model passes through those between only on paper: a block of the last operator
reads elements of a tensor that a block of the one before has written, and the two
affine maps make one.  So a composition moves the state once, and is an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import KEEPS, Block, Operator
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.statemap import AxisMap, Fill, compose


@dataclass(frozen=True)
class Composition:
    """Operators one after the other.

    Attributes:
        parts: the operators, the first one first.
        catalogs: the catalog before each of them.
    """

    parts: tuple[Operator, ...]
    catalogs: tuple[Catalog, ...]

    @property
    def name(self) -> str:
        """Joined as in a configuration."""
        return "+".join(part.name for part in self.parts)

    @property
    def summary(self) -> str:
        """All of them."""
        return ", then ".join(part.summary for part in self.parts)

    @property
    def keeps(self) -> str:
        """What all of them keep."""
        return max((part.keeps for part in self.parts), key=KEEPS.index)

    @property
    def breaker(self) -> str:
        """All of them."""
        return "; ".join(part.breaker for part in self.parts)

    @property
    def source(self) -> str:
        """All of them."""
        return "; ".join(part.source for part in self.parts)

    @cached_property
    def policies(self) -> Sequence[str]:
        """Those of all parts, in the order of the first."""
        first, *others = (part.policies for part in self.parts)
        return tuple(name for name in first if all(name in other for other in others))

    @property
    def sizes(self) -> Sequence[str]:
        """Those of all parts."""
        return tuple(key for part in self.parts for key in part.sizes)

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """The factor for each."""
        for part in self.parts:
            model = part.target(model, factor)
        return model

    def blocks(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[Block, ...]:
        """The blocks from the first catalog to the last."""
        return self._through(tensor, len(self.parts) - 1, (*self.catalogs, target))

    def fill(self, tensor: LogicalTensor) -> Fill:
        """What the parts agree on; they were checked (see `check_fills`)."""
        return self._fills[tensor.name]

    @cached_property
    def _fills(self) -> dict[str, Fill]:
        return {}

    def check_fills(self, target: Catalog) -> None:
        """Find what uncovered parameters become.

        Raises:
            GrowthError: an operator would have to copy values that one before it makes afresh.
        """
        catalogs = (*self.catalogs, target)
        for tensor in target:
            fills = self._fills_of(tensor, len(self.parts) - 1, catalogs) or {"covered"}
            if len(fills) > 1:
                raise GrowthError(
                    f"grow.operator: {self.name} leaves {tensor.name} partly fresh and partly 0",
                    mend="grow in two stages",
                )
            self._fills[tensor.name] = fills.pop()

    def _through(
        self, tensor: LogicalTensor, last: int, catalogs: Sequence[Catalog]
    ) -> tuple[Block, ...]:
        outer = self.parts[last].blocks(tensor, catalogs[last], catalogs[last + 1])
        if last == 0:
            return outer
        found = []
        for block in outer:
            for inner in self._through(catalogs[last][block.source], last - 1, catalogs):
                composed = _composed(block, inner, self)
                if composed is not None:
                    found.append(composed)
        return tuple(found)

    def _fills_of(self, tensor: LogicalTensor, last: int, catalogs: Sequence[Catalog]) -> set[Fill]:
        outer = self.parts[last].blocks(tensor, catalogs[last], catalogs[last + 1])
        fills: set[Fill] = set()
        if sum(block.volume for block in outer if block.param != 0.0) < tensor.volume:
            fills.add(self.parts[last].fill(tensor))
        if last == 0:
            return fills
        for block in outer:
            middle = catalogs[last][block.source]
            inner = self._fills_of(middle, last - 1, catalogs)
            as_it_was = middle.name == tensor.name and block.volume == tensor.volume
            if "fresh" in inner and not (as_it_was and block.param == 1.0):
                raise GrowthError(
                    f"grow.operator: {self.parts[last].name} would copy rows of {tensor.name} "
                    f"that {self.parts[last - 1].name} makes afresh",
                    mend=f"name {self.parts[last - 1].name} last",
                )
            fills |= inner
        return fills


def _composed(outer: Block, inner: Block, whole: Composition) -> Block | None:
    axes: list[AxisMap] = []
    for late, early in zip(outer.axes, inner.axes, strict=True):
        axis = compose(late, early)
        if axis is None:
            return None
        axes.append(axis)
    noise = outer.noise
    lengths = [axis.length for axis in outer.axes]
    if inner.noise is not None or (noise and [axis.length for axis in axes] != lengths):
        raise GrowthError(
            f"grow.operator: {whole.name} would copy noise, which then no longer cancels",
            mend="name the operator that adds noise last, after depth operators only",
        )
    grad = None if outer.grad is None or inner.grad is None else outer.grad * inner.grad
    return Block(
        source=inner.source,
        axes=tuple(axes),
        param=outer.param * inner.param,
        grad=grad,
        new=outer.new or inner.new,
        rate=_rate(outer) * _rate(inner),
        noise=noise,
    )


def _rate(block: Block) -> float:
    return block.param if block.rate is None else block.rate
