"""Boxes: axis-aligned pieces of an n-dimensional tensor, as arithmetic.

A flat range of a row-major tensor (what a ZeRO partition cuts out) is a few
boxes; a tensor-parallel slice is one.  Everything that is saved, moved or
grown is described by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A piece of a tensor: per axis an offset and a length (both in elements)."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements (1 for a box without axes)."""
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """Per axis, the first index past the box."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of a tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The overlap of the two boxes, or None if they are disjoint."""
        offset = tuple(map(max, self.offset, other.offset))
        stop = tuple(map(min, self.stop, other.stop))
        shape = tuple(b - a for a, b in zip(offset, stop, strict=True))
        return None if any(n <= 0 for n in shape) else Box(offset, shape)

    def contains(self, other: Box) -> bool:
        """Whether `other` is entirely inside."""
        return all(
            a <= c and d <= b
            for a, b, c, d in zip(self.offset, self.stop, other.offset, other.stop, strict=True)
        )

    def relative_to(self, origin: Sequence[int]) -> Box:
        """The same box in coordinates relative to `origin`."""
        return Box(tuple(o - p for o, p in zip(self.offset, origin, strict=True)), self.shape)

    def moved_by(self, origin: Sequence[int]) -> Box:
        """Convert back to absolute coordinates; inverts `relative_to`."""
        return Box(tuple(o + p for o, p in zip(self.offset, origin, strict=True)), self.shape)

    def __str__(self) -> str:
        return "[" + ",".join(f"{a}:{b}" for a, b in zip(self.offset, self.stop, strict=True)) + "]"


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a whole tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def flat_offset(shape: Sequence[int], index: Sequence[int]) -> int:
    """Row-major position of an index in a tensor of this shape."""
    position = 0
    for n, i in zip(shape, index, strict=True):
        position = position * n + i
    return position


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Cut the flat range [start, stop) of a row-major tensor into boxes.

    Yields (box, flat position of its first element) in rising order.  Every
    box is contiguous in memory, and there are at most 2n-1 for n axes: up to n-1 leading up to a
    full row, one of full rows, and n-1 after the last full row.
    """
    if not shape:
        if start < stop:
            yield Box((), ()), 0
        return
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    position = start
    while position < stop:
        # The outermost axis on which a whole step fits at this position.
        axis = next(a for a, s in enumerate(strides) if position % s == 0 and position + s <= stop)
        stride = strides[axis]
        index = [position // s % n for s, n in zip(strides, shape, strict=True)]
        steps = min((stop - position) // stride, shape[axis] - index[axis])
        box = Box(tuple(index), (1,) * axis + (steps,) + tuple(shape[axis + 1 :]))
        yield box, position
        position += steps * stride


def split_box(box: Box, limit: int) -> Iterator[Box]:
    """Cut a box into pieces of at most `limit` elements, in row-major order.

    Pieces are as long as possible along the last axes, so they stay close to
    contiguous in memory.
    """
    if box.volume <= limit:
        yield box
        return
    inner = 1
    axis = len(box.shape) - 1
    while inner * box.shape[axis] <= limit:
        inner *= box.shape[axis]
        axis -= 1
    step = max(1, limit // inner)
    for outer in np.ndindex(*box.shape[:axis]):
        for start in range(0, box.shape[axis], step):
            length = min(step, box.shape[axis] - start)
            position = (*outer, start) + (0,) * (len(box.shape) - axis - 1)
            shape = (1,) * axis + (length,) + box.shape[axis + 1 :]
            yield Box(position, shape).moved_by(box.offset)


def tiling_fault(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Check that boxes tile a tensor exactly: no gap, no overlap, nothing outside.

    Returns None if they do, otherwise one sentence saying what is wrong.
    """
    total = whole(shape)
    kept = sorted(boxes)
    for box in kept:
        if len(box.shape) != len(total.shape) or any(n <= 0 for n in box.shape):
            return f"box {box} is empty or has the wrong number of axes for shape {list(shape)}"
        if not total.contains(box):
            return f"box {box} reaches outside the tensor's shape {list(shape)}"
    overlap = _overlap(kept)
    if overlap:
        return f"boxes {overlap[0]} and {overlap[1]} overlap"
    covered = sum(box.volume for box in kept)
    if covered != total.volume:
        return f"boxes cover {covered} of {total.volume} elements: a piece is missing"
    return None


def _overlap(kept: Sequence[Box]) -> tuple[Box, Box] | None:
    if len(kept) < 2 or not kept[0].shape:
        return (kept[0], kept[1]) if len(kept) > 1 else None
    starts = np.array([box.offset for box in kept], dtype=np.int64)
    stops = np.array([box.stop for box in kept], dtype=np.int64)
    for i in range(len(kept) - 1):
        # Sorted by first offset, so only boxes that start before this one ends can overlap it.
        end = i + 1 + int(np.searchsorted(starts[i + 1 :, 0], stops[i, 0], side="left"))
        if end == i + 1:
            continue
        meets = (starts[i + 1 : end] < stops[i]).all(1) & (stops[i + 1 : end] > starts[i]).all(1)
        if meets.any():
            return kept[i], kept[i + 1 + int(meets.argmax())]
    return None


def union_volume(boxes: Iterable[Box]) -> int:
    """Number of elements covered by at least one of the boxes."""
    distinct = set(boxes)
    if not distinct:
        return 0
    starts = np.array([box.offset for box in distinct], dtype=np.int64)
    stops = np.array([box.stop for box in distinct], dtype=np.int64)
    if starts.shape[1] == 0:
        return 1
    # On the grid formed by all box edges, every box is a block of whole cells.
    edges = [np.union1d(starts[:, axis], stops[:, axis]) for axis in range(starts.shape[1])]
    covered = np.zeros([len(edge) - 1 for edge in edges], dtype=bool)
    for start, stop in zip(starts, stops, strict=True):
        covered[
            tuple(
                slice(int(np.searchsorted(edge, a)), int(np.searchsorted(edge, b)))
                for edge, a, b in zip(edges, start, stop, strict=True)
            )
        ] = True
    volume = covered.astype(np.int64)
    for edge in reversed(edges):
        volume = volume @ np.diff(edge)
    return int(volume)
