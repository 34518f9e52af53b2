"""Which elements of a box belong to which growth of its tensor: indices into the box."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from megagrow.growth.optimizer_rules import Progression, YoungBlocks
from megagrow.state.boxes import Box

Index = tuple[slice, ...]


def bands(blocks: YoungBlocks, box: Box) -> Iterator[tuple[Box, YoungBlocks | None]]:
    """Cut a box along its first axis so that in each part old elements are one progression an axis.

    Args:
        blocks: the new blocks of the tensor; `rows` may tell them apart.
        box: the box, in logical coordinates.

    Yields:
        Consecutive parts, each with the new blocks in it, which have no `rows`; None if all of it
        is old.
    """
    if not blocks.rows:
        if blocks.inside is None:
            yield box, blocks
            return
        for part, inside in bands(blocks.inside, box):
            yield part, replace(blocks, inside=inside)
        return
    at, end = box.offset[0], box.stop[0]
    new = replace(blocks, kept=None, inside=None, rows=())
    for first, _, count in (*blocks.rows, (end, 1, 0)):
        start, stop = max(first, at), min(first + count, end)
        if start > at and at < end:
            yield _band(box, at, min(start, end)), new
        if start < stop:
            old = _band(box, start, stop)
            yield from [(old, None)] if blocks.inside is None else bands(blocks.inside, old)
        at = max(at, stop)


def _band(box: Box, start: int, stop: int) -> Box:
    return Box((start, *box.offset[1:]), (stop - start, *box.shape[1:]))


def generations(blocks: YoungBlocks, box: Box) -> list[tuple[Index, YoungBlocks | None]]:
    """Cut a box into parts by the growth that added them.

    Args:
        blocks: the new blocks of the tensor, without `rows` (see `bands`).
        box: the box, in logical coordinates.

    Returns:
        (index, the blocks it belongs to; None for the old part); indices are relative to the
        box's corner, do not overlap and cover the box.
    """
    found: list[tuple[Index, YoungBlocks | None]] = []
    view = [range(n) for n in box.shape]  # what remains for the earlier growths
    level: YoungBlocks | None = blocks
    while level is not None:
        old, _ = regions(level.kept, box)
        if not old:
            return [*found, (_slices(view), level)]
        inner = [range(n)[part] for n, part in zip(box.shape, old[0], strict=True)]
        at = [_relative(axis, part) for axis, part in zip(view, inner, strict=True)]
        for axis, part in enumerate(at):
            # Old on earlier axes, new on this one, anything on later axes: disjoint and complete.
            for gap in _gaps(part, len(view[axis])):
                found.append((_slices([*inner[:axis], view[axis][gap], *view[axis + 1 :]]), level))
        view, level = inner, level.inside
    return [*found, (_slices(view), None)]


def _relative(view: range, part: range) -> slice:
    """The elements of a part of a view as an index into the view."""
    first = view.index(part[0])
    step = view.index(part[1]) - first if len(part) > 1 else 1
    return slice(first, first + (len(part) - 1) * step + 1, step)


def _slices(axes: Iterable[range]) -> Index:
    return tuple(slice(axis.start, axis.stop, axis.step) for axis in axes)


def regions(kept: Sequence[Progression] | None, box: Box) -> tuple[list[Index], list[Index]]:
    """Cut a box into its old part and its new parts.

    Args:
        kept: per axis the old block's elements, in logical coordinates; None if all is new.
        box: the box, in logical coordinates.

    Returns:
        (at most one index of the old part, indices of the new parts); indices are relative to
        the box's corner, do not overlap and cover the box.
    """
    everything = tuple(slice(0, n) for n in box.shape)
    if kept is None:
        return [], [everything]
    inside = [
        _clip(progression, start, stop)
        for progression, start, stop in zip(kept, box.offset, box.stop, strict=True)
    ]
    if any(part is None for part in inside):
        return [], [everything]
    old = tuple(part for part in inside if part is not None)
    young: list[Index] = []
    for axis, part in enumerate(old):
        # Old on earlier axes, new on this one, anything on later axes: disjoint and complete.
        young += [
            (*old[:axis], gap, *everything[axis + 1 :]) for gap in _gaps(part, box.shape[axis])
        ]
    return [old], young


def _clip(progression: Progression, start: int, stop: int) -> slice | None:
    first, step, count = progression
    low = max(0, -((first - start) // step))
    high = min(count, -((first - stop) // step))
    if low >= high:
        return None
    begin = first + low * step - start
    return slice(begin, begin + (high - low - 1) * step + 1, step)


def _gaps(part: slice, length: int) -> Iterator[slice]:
    """Progressions that cover the elements of [0, length) outside a progression."""
    step = part.step or 1
    if part.start > 0:
        yield slice(0, part.start)
    for residue in range(1, step):
        # The last period may extend past the old block's last element; clip it there.
        if part.start + residue < part.stop:
            yield slice(part.start + residue, part.stop, step)
    if part.stop < length:
        yield slice(part.stop, length)
