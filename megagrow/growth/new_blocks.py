"""Which elements of a grown tensor are new, and where the new elements of earlier growths are now.

The old elements of a tensor must be one arithmetic progression per axis, so that the optimizer can
tell old elements from new ones by index alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megagrow.growth.operator import GrowthBlock
from megagrow.growth.optimizer_rules import OptimizerRules, Progression, YoungBlocks
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap


def is_whole(tensor: LogicalTensor, blocks: Sequence[GrowthBlock]) -> bool:
    """Whether a tensor is an element-wise copy of another."""
    whole = tuple((0, 1, n) for n in tensor.shape)
    return len(blocks) == 1 and _progressions(blocks[0]) == whole


def covers(tensor: LogicalTensor, blocks: Sequence[GrowthBlock]) -> bool:
    """Whether the blocks cover the whole tensor."""
    return sum(b.volume for b in blocks) == tensor.volume


def kept_by(blocks: Sequence[GrowthBlock]) -> tuple[Progression, ...] | None:
    """The union of the blocks' elements, as one progression per axis; None if it is empty.

    Raises:
        ValueError: the union does not have that form.
    """
    return _product([_progressions(b) for b in blocks]) if blocks else None


def carried(young: YoungBlocks, blocks: Sequence[GrowthBlock]) -> YoungBlocks:
    """Where blocks copy the new blocks of an earlier growth to.

    Raises:
        ValueError: the old elements are no longer one progression per axis.
    """
    if young.kept is None:
        return replace(young, inside=None)
    images = [[_image(*pair) for pair in zip(b.axes, young.kept, strict=True)] for b in blocks]
    parts = [tuple(map(_progression, axes)) for axes in images if all(axes)]
    return replace(
        young,
        kept=_product(parts) if parts else None,
        inside=young.inside and carried(young.inside, blocks),
    )


def with_unfrozen(rules: OptimizerRules, before: Catalog, *, step: int) -> OptimizerRules:
    """The rules with every tensor that was frozen counted as new.

    A frozen tensor has no moments. When it is trained again they start at zero, and the steps of
    its bias correction are counted from there, as those of the tensors that a growth adds.

    Args:
        rules: the rules so far.
        before: the tensors of the stage that ends.
        step: the optimizer's step count.
    """
    fresh = YoungBlocks(kept=None, born=step, peak=1.0, rewarm=0)
    return OptimizerRules(rules.factors, {**rules.young, **dict.fromkeys(before.frozen, fresh)})


def retrained(
    rules: OptimizerRules, before: Catalog, after: Catalog, *, step: int
) -> OptimizerRules:
    """The rules when other tensors of the same model are trained (see `with_unfrozen`).

    Args:
        rules: the rules so far.
        before, after: the tensors, with those that are frozen marked.
        step: the optimizer's step count.
    """
    if before == after:
        return rules
    young = with_unfrozen(rules, before, step=step).young
    trained = {name: new for name, new in young.items() if name not in after.frozen}
    return OptimizerRules(rules.factors, trained)


def _progressions(block: GrowthBlock) -> tuple[Progression, ...]:
    return tuple((axis.target_start, axis.target_step, axis.length) for axis in block.axes)


def _product(blocks: Sequence[tuple[Progression, ...]]) -> tuple[Progression, ...]:
    """The union of disjoint products of progressions as one; raises ValueError if it is not one."""
    joined = []
    for parts in zip(*blocks, strict=True):
        distinct = sorted(set(parts))
        start, step, _ = distinct[0]
        count = 0
        for first, each, n in distinct:
            if each != step or first != start + count * step:
                raise ValueError("not one progression")
            count += n
        joined.append((start, step, count))
    if math.prod(n for *_, n in joined) != sum(math.prod(n for *_, n in axes) for axes in blocks):
        raise ValueError("not a product")
    return tuple(joined)


def _image(axis: AxisMap, progression: Progression) -> list[int]:
    """Where a block copies the elements of a progression to, along one axis."""
    first, step, count = progression
    source = range(
        axis.source_start, axis.source_start + axis.length * axis.source_step, axis.source_step
    )
    return [
        axis.target_start + source.index(at) * axis.target_step
        for at in range(first, first + count * step, step)
        if at in source
    ]


def _progression(indices: list[int]) -> Progression:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if indices != list(range(indices[0], indices[-1] + 1, step)):
        raise ValueError("not a progression")
    return indices[0], step, len(indices)
