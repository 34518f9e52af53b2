"""Which elements of a grown tensor are new, and where the new elements of earlier growths are now.

The old elements of a tensor must be one arithmetic progression per axis, so that the optimizer can
tell old elements from new ones by index alone; or up to `MOST_RUNS` ranges of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megagrow.errors import GrowthError
from megagrow.growth.operator import GrowthBlock
from megagrow.growth.optimizer_rules import OptimizerRules, Progression, YoungBlocks
from megagrow.growth.policy import POLICIES, StatePolicy
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap

MOST_RUNS = 1024  # ranges of old rows in a run's state


def young_after(
    tensor: LogicalTensor,
    blocks: Sequence[GrowthBlock],
    *,
    policy: StatePolicy,
    policies: Sequence[str],
    rewarm: int,
    before: OptimizerRules,
    step: int,
    betas: tuple[float, float] | None,
) -> YoungBlocks | None:
    """The new blocks of a tensor after a growth, and inside its old block those of earlier growths.

    Elements are new if their moments start at zero: with the optimizer's step count their
    first updates would be too large.  (`shen` accepts that in copied blocks, as published.)

    Args:
        tensor, blocks: of the grown model.
        policy: the growth's state policy, and `policies` those that its operator supports.
        rewarm: number of steps of re-warming.
        before: the optimizer's rules before the growth.
        step, betas: the optimizer's, as for `Growth.rules_after`.

    Raises:
        GrowthError: as `Growth.rules_after`, or the old elements cannot be told by index.
    """
    if policy.restart_steps:  # all step counts start from 0, so nothing may be older
        return None
    peak = policy.new_block_peak
    if step == 0 and peak == 1.0 and not before.young:
        return None  # all step counts are 0
    earlier = before.young.get(blocks[0].source) if blocks else None
    old = blocks if peak is None else [b for b in blocks if not b.new]
    if is_whole(tensor, old):
        return earlier
    if earlier is not None:
        try:
            earlier = carried(earlier, old)
        except ValueError:
            if betas is not None and earlier.matters(step, betas=betas):
                raise _too_young(policy, tensor, earlier, step) from None
            earlier = None
    if covers(tensor, old):
        return earlier
    rows: tuple[Progression, ...] = ()
    try:
        kept = kept_by(old)
    except ValueError:
        kept, rows = kept_rows(tensor, old)
        if not rows:
            raise _scattered(policy, policies, tensor) from None
    # If a policy does not re-warm new blocks, they have the same rate as the others.
    return YoungBlocks(
        kept=kept,
        born=step,
        peak=1.0 if peak is None else peak,
        rewarm=0 if peak is None else rewarm,
        inside=None if kept is None else earlier,
        rows=rows,
    )


def _too_young(
    policy: StatePolicy, tensor: LogicalTensor, young: YoungBlocks, step: int
) -> GrowthError:
    return GrowthError(
        f"grow.state_policy {policy.name!r}: the new elements of {tensor.name} of the "
        "growth before would be copied among old ones, but AdamW still counts their own steps",
        found=f"a growth {step - young.born} optimizer steps after that one",
        fix="set grow.state_policy to kept, sparkling or reset, or grow later",
    )


def _scattered(policy: StatePolicy, policies: Sequence[str], tensor: LogicalTensor) -> GrowthError:
    fitting = [name for name in policies if POLICIES[name].new_block_peak is None]
    return GrowthError(
        f"state policy {policy.name!r}: this growth scatters the old elements of "
        f"{tensor.name}, so they cannot be distinguished from the new ones by index",
        fix=f"set grow.state_policy to {' or '.join(fitting) or 'reset'}",
    )


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


def kept_rows(
    tensor: LogicalTensor, blocks: Sequence[GrowthBlock]
) -> tuple[tuple[Progression, ...], tuple[Progression, ...]]:
    """The elements of blocks of whole rows: (all of every axis, the ranges of rows).

    There are none if another axis grew too, or if there would be more than `MOST_RUNS` ranges.
    """
    found = [_progressions(block) for block in blocks]
    every = tuple((0, 1, n) for n in tensor.shape)
    if any(axes[1:] != every[1:] or axes[0][1] != 1 for axes in found):
        return every, ()
    rows: list[Progression] = []
    for start, _, count in sorted(axes[0] for axes in found):
        if rows and rows[-1][0] + rows[-1][2] == start:
            rows[-1] = (rows[-1][0], 1, rows[-1][2] + count)
        else:
            rows.append((start, 1, count))
    return every, tuple(rows) if len(rows) <= MOST_RUNS else ()


def carried(young: YoungBlocks, blocks: Sequence[GrowthBlock]) -> YoungBlocks:
    """Where blocks copy the new blocks of an earlier growth to.

    Raises:
        ValueError: the old elements are no longer one progression per axis.
    """
    if young.kept is None:
        return replace(young, inside=None)
    at_place = (AxisMap(0, 1, 0, 1, block.axes[0].length) == block.axes[0] for block in blocks)
    if young.rows and not all(at_place):
        raise ValueError("ranges of rows move")
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
