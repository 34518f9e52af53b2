"""State maps: how the next training state is computed from the last, as data.

For every target tensor and slot, a state map lists the blocks of source tensors that it consists
of. The identity is one; a growth operator with its state policy defines another.  A block maps
indices axis by axis through arithmetic progressions, so that copies may be laid end to end
(``tile``) or interleaved (``repeat``) without any special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megagrow.state.boxes import Box
from megagrow.state.catalog import Catalog, LogicalTensor, Slot


@dataclass(frozen=True, slots=True)
class AxisMap:
    """How a block maps indices along one axis.

    Element u is target index ``target_start + u * target_step`` and source index
    ``source_start + u * source_step``, for 0 <= u < length.
    """

    target_start: int
    target_step: int
    source_start: int
    source_step: int
    length: int

    def from_target(self, start: int, stop: int) -> tuple[int, int]:
        """The u whose target index is in [start, stop): (first, last + 1)."""
        return _pull(self.target_start, self.target_step, self.length, start, stop)

    def from_source(self, start: int, stop: int) -> tuple[int, int]:
        """The u whose source index is in [start, stop): (first, last + 1)."""
        return _pull(self.source_start, self.source_step, self.length, start, stop)


def compose(outer: AxisMap, inner: AxisMap) -> AxisMap | None:
    """Compose two axis maps; None if they share no element.

    Outer's source axis is inner's target axis.  The common elements of two progressions are
    again a progression.
    """
    step, other = outer.source_step, inner.target_step
    common = math.gcd(step, other)
    gap, rest = divmod(inner.target_start - outer.source_start, common)
    if rest:
        return None
    # outer's element u equals inner's element w where u * step = w * other + (difference).
    du, dw = other // common, step // common
    u = gap * pow(dw, -1, du) % du
    w = (u * dw - gap) // du
    if w < 0:
        turns = -(w // dw)
        u, w = u + turns * du, w + turns * dw
    if u >= outer.length or w >= inner.length:
        return None
    return AxisMap(
        outer.target_start + u * outer.target_step,
        du * outer.target_step,
        inner.source_start + w * inner.source_step,
        dw * inner.source_step,
        1 + min((outer.length - 1 - u) // du, (inner.length - 1 - w) // dw),
    )


def _pull(first: int, step: int, length: int, start: int, stop: int) -> tuple[int, int]:
    low = max(0, -((first - start) // step))
    high = min(length, -((first - stop) // step))
    return low, high


@dataclass(frozen=True, slots=True)
class Statistic:
    """A statistic of a source tensor's parameters: one number, or one per index of the other axes.

    Attributes:
        tensor, shape: the source tensor.
        kind: root mean square, or mean.
        axis: the axis that is reduced; None: all axes.
    """

    tensor: str
    shape: tuple[int, ...]
    kind: Literal["rms", "mean"]
    axis: int | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of its values: the tensor's shape with reduced axes of length 1."""
        return tuple(1 if self.axis in (None, at) else n for at, n in enumerate(self.shape))

    @property
    def count(self) -> int:
        """Number of elements that are reduced to one."""
        return math.prod(self.shape) // math.prod(self.kept)


@dataclass(frozen=True, slots=True)
class Noise:
    """Normal random numbers over a block.

    They are a function of the run's seed, this name and the element alone.  Blocks of equal
    shape with the same name have the same numbers, times their own `std` (which may be negative),
    so that they can cancel.

    Attributes:
        std: their standard deviation, in units of `statistic` if it is given.
        statistic: a statistic that is one number.
    """

    name: str
    std: float
    statistic: Statistic | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A fill: normal random numbers, a function of the run's seed, this name and the element alone.

    Their standard deviation is `std` times a statistic that is one number.
    """

    name: str
    std: float
    statistic: Statistic


@dataclass(frozen=True, slots=True)
class Level:
    """A fill: `coefficient` times a statistic, plus `shift`, in one block; zeros elsewhere.

    Attributes:
        axes: the block. On a reduced axis of the statistic, the source side is not used.
    """

    statistic: Statistic
    axes: tuple[AxisMap, ...]
    coefficient: float = 1.0
    shift: float = 0.0


Fill = Literal["covered", "zeros", "fresh"] | Drawn | Level


@dataclass(frozen=True, slots=True)
class Copy:
    """One block of one slot: target elements = coefficient * source elements + shift (+ noise).

    Attributes:
        term: its place in a sum. Blocks of term 0 set target elements; those of term 1, then those
            of term 2, and so on, add to elements that an earlier term has set.  The order of the
            terms is that of the additions, so a sum is bit-identical in every layout.
    """

    source: str
    axes: tuple[AxisMap, ...]
    coefficient: float
    noise: Noise | None = None
    shift: float = 0.0
    term: int = 0

    @property
    def scales_only(self) -> bool:
        """Whether it sets its elements to multiples of the source's."""
        return self.noise is None and self.shift == 0.0 and self.term == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's own shape."""
        return tuple(axis.length for axis in self.axes)

    @property
    def volume(self) -> int:
        """Number of elements in the block."""
        return math.prod(self.shape)

    def from_target(self, box: Box) -> Box | None:
        """The part of the block that lands in a target box, in block coordinates."""
        return _block_box(
            [
                axis.from_target(a, b)
                for axis, a, b in zip(self.axes, box.offset, box.stop, strict=True)
            ]
        )

    def from_source(self, box: Box) -> Box | None:
        """The part of the block that is read from a source box, in block coordinates."""
        return _block_box(
            [
                axis.from_source(a, b)
                for axis, a, b in zip(self.axes, box.offset, box.stop, strict=True)
            ]
        )

    def target_slices(self, part: Box, origin: Sequence[int]) -> tuple[slice, ...]:
        """The target index of a part of the block, relative to `origin`."""
        return tuple(
            _progression(axis.target_start - o, axis.target_step, u, n)
            for axis, o, u, n in zip(self.axes, origin, part.offset, part.shape, strict=True)
        )

    def source_slices(self, part: Box, origin: Sequence[int]) -> tuple[slice, ...]:
        """The source index of a part of the block, relative to `origin`."""
        return tuple(
            _progression(axis.source_start - o, axis.source_step, u, n)
            for axis, o, u, n in zip(self.axes, origin, part.offset, part.shape, strict=True)
        )

    def target_hull(self, part: Box) -> Box:
        """The smallest target box around a part of the block."""
        return _hull(self.target_slices(part, (0,) * len(self.axes)))

    def source_hull(self, part: Box) -> Box:
        """The smallest source box around a part of the block."""
        return _hull(self.source_slices(part, (0,) * len(self.axes)))


def _block_box(ranges: Sequence[tuple[int, int]]) -> Box | None:
    if any(low >= high for low, high in ranges):
        return None
    return Box(tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges))


def _progression(first: int, step: int, u: int, n: int) -> slice:
    start = first + u * step
    return slice(start, start + (n - 1) * step + 1, step)


def _hull(slices: Sequence[slice]) -> Box:
    return Box(tuple(s.start for s in slices), tuple(s.stop - s.start for s in slices))


class StateMap(Protocol):
    """How every slot of a target catalog is computed from a source catalog."""

    @property
    def target(self) -> Catalog:
        """The target catalog."""
        ...

    def copies(self, tensor: LogicalTensor, slot: Slot) -> Sequence[Copy]:
        """The blocks of one slot of a target tensor, by term.

        Those of one term do not overlap in the target.
        """
        ...

    def fill(self, tensor: LogicalTensor, slot: Slot) -> Fill:
        """The fill of elements that no block covers."""
        ...


@dataclass(frozen=True)
class Identity:
    """The state map that changes nothing.

    Attributes:
        target: the tensors.
        source: the same tensors before, if some of them may have been frozen and so have no
            moments, which then start at zero.
    """

    target: Catalog
    source: Catalog | None = None

    def copies(self, tensor: LogicalTensor, slot: Slot) -> Sequence[Copy]:
        """One block: all of the tensor of the same name."""
        if self.source is not None and not slot.of(self.source[tensor.name]):
            return ()
        return (Copy(tensor.name, tuple(AxisMap(0, 1, 0, 1, n) for n in tensor.shape), 1.0),)

    def fill(self, tensor: LogicalTensor, slot: Slot) -> Fill:
        """Nothing is left uncovered, except moments that the source lacks."""
        return "covered" if self.copies(tensor, slot) else "zeros"


@dataclass(frozen=True)
class FreshStart:
    """The state map of a run's first step: initial parameters, optimizer state zero."""

    target: Catalog

    def copies(self, tensor: LogicalTensor, slot: Slot) -> Sequence[Copy]:
        """No block."""
        return ()

    def fill(self, tensor: LogicalTensor, slot: Slot) -> Fill:
        """Fresh parameters, zero optimizer state."""
        return "fresh" if slot.kind == "parameter" else "zeros"


@dataclass(frozen=True)
class WeightsAlone:
    """Another state map's parameters, with optimizer state zero: the source may have none."""

    inner: StateMap

    @property
    def target(self) -> Catalog:
        """The target catalog."""
        return self.inner.target

    def copies(self, tensor: LogicalTensor, slot: Slot) -> Sequence[Copy]:
        """The blocks of parameters; none of optimizer state."""
        return self.inner.copies(tensor, slot) if slot.kind == "parameter" else ()

    def fill(self, tensor: LogicalTensor, slot: Slot) -> Fill:
        """The fill of parameters; zero optimizer state."""
        return self.inner.fill(tensor, slot) if slot.kind == "parameter" else "zeros"
