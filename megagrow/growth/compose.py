"""Several operators in one growth: the composition of their blocks.

The intermediate models are never materialised: a block of the last operator reads elements of a
tensor that a block of the previous one has written, and the two affine maps compose to one. So a
composition moves the state once, and is itself an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.new_blocks import is_whole
from megagrow.growth.operator import KEEPS, GrowthBlock, Operator
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap, Drawn, Fill, Level, Statistic, compose


@dataclass(frozen=True, kw_only=True)
class Composition(Operator):
    """Operators applied in order (see `composed`).

    Attributes:
        parts: the operators, the first one first.
        catalogs: the catalog before each of them.
    """

    parts: tuple[Operator, ...]
    catalogs: tuple[Catalog, ...]

    @property
    def lacking(self) -> bool:
        """Whether any part is."""
        return any(part.lacking for part in self.parts)

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """The factor for each."""
        for part in self.parts:
            model = part.target(model, factor)
        return model

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """The blocks from the first catalog to the last."""
        blocks = self._through(tensor, len(self.parts) - 1, (*self.catalogs, target))
        return tuple(sorted(blocks, key=lambda block: block.term))

    def interchangeable(self, small: Catalog, target: Catalog) -> bool:
        """Whether the copies of any part are; later operators treat them alike."""
        catalogs = (*self.catalogs, target)
        return any(
            part.interchangeable(before, after)
            for part, before, after in zip(self.parts, catalogs, catalogs[1:], strict=False)
        )

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """The fill that the parts agree on; already checked (see `check_fills`)."""
        return self._fills[tensor.name]

    @cached_property
    def _fills(self) -> dict[str, Fill]:
        return {}

    def check_fills(self, target: Catalog) -> None:
        """Determine the fill of parameters that no block covers.

        Raises:
            GrowthError: an operator would have to copy values that an earlier one initialises.
        """
        catalogs = (*self.catalogs, target)
        for tensor in target:
            fills = self._fills_of(tensor, len(self.parts) - 1, catalogs) or {"covered"}
            if any(isinstance(fill, Level) for fill in fills):
                fills -= {"zeros"}  # which a level is outside its block
            if len(fills) > 1:
                raise GrowthError(
                    f"grow.operator: {self.name} would fill parts of {tensor.name} in two ways",
                    fix="grow in two stages",
                )
            self._fills[tensor.name] = fills.pop()

    def _traced(self, fill: Fill, last: int, catalogs: Sequence[Catalog]) -> Fill:
        """The fill of the operator `last`, in terms of the first catalog's tensors.

        Raises:
            GrowthError: it depends on a tensor that earlier operators do not merely copy.
        """
        if last == 0 or isinstance(fill, str):
            return fill
        statistic, scale = self._statistic(fill.statistic, last, catalogs)
        if isinstance(fill, Drawn):
            return replace(fill, statistic=statistic, std=fill.std * scale)
        return replace(fill, statistic=statistic, coefficient=fill.coefficient * scale)

    def _statistic(
        self, statistic: Statistic, last: int, catalogs: Sequence[Catalog]
    ) -> tuple[Statistic, float]:
        """A statistic of the catalog before the operator `last`, as a multiple of one of the first.

        Raises:
            GrowthError: earlier operators do not merely copy its tensor.
        """
        tensor = catalogs[last][statistic.tensor]
        blocks = self._through(tensor, last - 1, catalogs)
        if not is_whole(tensor, blocks) or blocks[0].noise is not None:
            raise GrowthError(
                f"grow.operator: {self.parts[last].name} depends on the values of {tensor.name}, "
                "which the operators before it change",
                found=self.name,
                fix="grow in two stages",
            )
        [block] = blocks
        scale = abs(block.param) if statistic.kind == "rms" else block.param
        return replace(statistic, tensor=block.source), scale

    def _through(
        self, tensor: LogicalTensor, last: int, catalogs: Sequence[Catalog]
    ) -> tuple[GrowthBlock, ...]:
        outer = self.parts[last].blocks(tensor, catalogs[last], catalogs[last + 1])
        if last == 0:
            return outer
        found = []
        for block in outer:
            outside = block
            if block.noise is not None and block.noise.statistic is not None:
                own, scale = self._statistic(block.noise.statistic, last, catalogs)
                noise = replace(block.noise, statistic=own, std=block.noise.std * scale)
                outside = replace(block, noise=noise)
            for inner in self._through(catalogs[last][block.source], last - 1, catalogs):
                joined = _joined(outside, inner, self)
                if joined is not None:
                    found.append(joined)
        return tuple(found)

    def _fills_of(self, tensor: LogicalTensor, last: int, catalogs: Sequence[Catalog]) -> set[Fill]:
        outer = self.parts[last].blocks(tensor, catalogs[last], catalogs[last + 1])
        fills: set[Fill] = set()
        if sum(block.volume for block in outer if block.param != 0.0) < tensor.volume:
            fill = self.parts[last].fill(tensor, catalogs[last], catalogs[last + 1])
            fills.add(self._traced(fill, last, catalogs))
        if last == 0:
            return fills
        for block in outer:
            middle = catalogs[last][block.source]
            inner = self._fills_of(middle, last - 1, catalogs)
            as_it_was = middle.name == tensor.name and block.volume == tensor.volume
            if inner - {"covered", "zeros"} and not (as_it_was and block.param == 1.0):
                raise GrowthError(
                    f"grow.operator: {self.parts[last].name} would copy rows of {tensor.name} "
                    f"that {self.parts[last - 1].name} makes afresh",
                    fix=f"name {self.parts[last - 1].name} last",
                )
            fills |= inner
        return fills


def composed(parts: Sequence[Operator], catalogs: Sequence[Catalog]) -> Composition:
    """Several operators as one.

    Args:
        parts: the operators, the first one first.
        catalogs: the catalog before each of them.

    Raises:
        GrowthError: one of them is fitted on data.
    """
    for part in parts:
        if part.fitted:
            raise GrowthError(
                f"grow.operator: {part.name} is fitted on data and does not go with others",
                found="+".join(part.name for part in parts),
                fix="grow in two stages",
            )
    first, *others = (part.policies for part in parts)
    return Composition(
        name="+".join(part.name for part in parts),
        summary=", then ".join(part.summary for part in parts),
        keeps=max((part.keeps for part in parts), key=KEEPS.index),
        breaker="; ".join(part.breaker for part in parts),
        source="; ".join(part.source for part in parts),
        policies=tuple(name for name in first if all(name in other for other in others)),
        sizes=tuple(key for part in parts for key in part.sizes),
        ramp=max(part.ramp for part in parts),
        parts=tuple(parts),
        catalogs=tuple(catalogs),
    )


def _joined(outer: GrowthBlock, inner: GrowthBlock, whole: Composition) -> GrowthBlock | None:
    axes: list[AxisMap] = []
    for late, early in zip(outer.axes, inner.axes, strict=True):
        axis = compose(late, early)
        if axis is None:
            return None
        axes.append(axis)
    if outer.term and inner.term:
        raise GrowthError(
            f"grow.operator: {whole.name} would add up sums of rows", fix="grow in two stages"
        )
    noise = outer.noise
    lengths = [axis.length for axis in outer.axes]
    if inner.noise is not None or (noise and [axis.length for axis in axes] != lengths):
        raise GrowthError(
            f"grow.operator: {whole.name} would copy noise, which then no longer cancels",
            fix="name the operator that adds noise last, after depth operators only",
        )
    grad = None if outer.grad is None or inner.grad is None else outer.grad * inner.grad
    return GrowthBlock(
        source=inner.source,
        axes=tuple(axes),
        param=outer.param * inner.param,
        grad=grad,
        new=outer.new or inner.new,
        rate=_rate(outer) * _rate(inner),
        noise=noise,
        term=outer.term + inner.term,
        share=outer.share * inner.share,
    )


def _rate(block: GrowthBlock) -> float:
    return block.param if block.rate is None else block.rate
