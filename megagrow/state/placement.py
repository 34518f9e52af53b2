"""Placement: which rank holds which boxes of a catalog on a process grid.

Everything is computed, for any rank, from the catalog, the layout and the parameter groups alone,
so every rank can plan a transfer without communication.

How DeepSpeed 0.19 partitions optimizer state over the data-parallel ranks:
  ZeRO 0     not at all: each rank holds all of its tensor-parallel slice;
  ZeRO 1, 2  the parameters of a group are laid end to end, padded to a
             multiple of 2 * data, and cut into `data` equal flat ranges;
  ZeRO 3     each parameter is padded to a multiple of `data` and cut alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megagrow.state.boxes import Box, flat_offset, flat_range_boxes, whole
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.layout import SPLIT_AXES, Coordinates, Layout, balanced_cuts, even_split

FLAT_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor
# Begins the name of the parameter, with the group's number behind it, that a pipeline stage has in
# a group of which it holds no tensor.
PLACEHOLDER = "stand_in_for_group_"


@dataclass(frozen=True, slots=True)
class Shard:
    """A box that a rank holds.

    Attributes:
        tensor: name of the logical tensor.
        box: which part of it, in logical coordinates.
        start: flat position of the box in the rank's local parameter, in which the box is
            contiguous.
    """

    tensor: str
    box: Box
    start: int


@dataclass(frozen=True, slots=True)
class Local:
    """A rank's tensor-parallel slice of a tensor, before ZeRO partitions it.

    `shape` is what the parameter has in memory; it is larger than `box` if the vocabulary is
    padded.
    """

    box: Box
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements in memory, padding included."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a local parameter is in its group's flat buffer (in elements)."""

    start: int
    partition: int  # size of one data rank's flat range


class Placement:
    """A catalog on a layout.

    Args:
        catalog: the logical tensors.
        layout: the process grid.
        group_of: the optimizer's parameter group of a tensor, as any sortable key; groups
            are laid out in the order of their keys.
        weights: cost of each entry of the layer list, which is balanced over pipeline stages; by
            default its number of parameters.
    """

    def __init__(
        self,
        catalog: Catalog,
        layout: Layout,
        group_of: Mapping[str, Hashable] | None = None,
        weights: Sequence[int] | None = None,
    ) -> None:
        self.catalog = catalog
        self.layout = layout
        self._weights = weights
        self._group_of = group_of or dict.fromkeys((t.name for t in catalog), 0)
        self._stages_at: dict[tuple[int, ...], tuple[int, ...]] = {}  # by the places of a tensor

    # --- pipeline and tensor parallel -----------------------------------------------------

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Pipeline cuts of the layer list: stage s runs places cuts[s] to cuts[s+1]."""
        if self._weights is not None:
            return balanced_cuts(self._weights, self.layout.pipeline)
        weights = [0] * (1 + max(place for t in self.catalog for place in t.places))
        for tensor in self.catalog:
            for place in tensor.places:
                weights[place] += tensor.volume
        return balanced_cuts(weights, self.layout.pipeline)

    def stages(self, tensor: LogicalTensor) -> tuple[int, ...]:
        """Pipeline stages that hold a tensor; the first one owns it."""
        places = tensor.places
        if places not in self._stages_at:
            at = {bisect_right(self.cuts, place) - 1 for place in places}
            self._stages_at[places] = tuple(sorted(at))
        return self._stages_at[places]

    def local(self, tensor: LogicalTensor, tensor_rank: int) -> Local:
        """The tensor-parallel slice of one rank."""
        full = whole(tensor.shape)
        axis = split_axis(tensor)
        if axis is None or self.layout.tensor == 1:
            return Local(full, tensor.shape)
        start, stop = even_split(tensor.shape[axis], self.layout.tensor, tensor_rank)
        offset, shape, padded = list(full.offset), list(full.shape), list(full.shape)
        offset[axis], shape[axis] = start, stop - start
        padded[axis] = -(-tensor.shape[axis] // self.layout.tensor)
        return Local(Box(tuple(offset), tuple(shape)), tuple(padded))

    def groups(self, stage: int) -> list[tuple[Hashable, list[LogicalTensor]]]:
        """Parameter groups of a pipeline stage: (key, tensors), in the optimizer's order."""
        members: dict[Hashable, list[LogicalTensor]] = {}
        for tensor in self.catalog:
            if stage in self.stages(tensor):
                members.setdefault(self._group_of[tensor.name], []).append(tensor)
        return sorted(members.items(), key=lambda item: item[0])  # type: ignore[arg-type, return-value]

    # --- ZeRO partitions ------------------------------------------------------------------

    def shards(self, rank: int) -> Iterator[Shard]:
        """All boxes that a rank holds, in the order of its groups."""
        at = self.layout.coordinates(rank)
        for _, tensors in self.groups(at.pipe):
            for tensor in tensors:
                yield from self._shards_of(tensor, at)

    def shards_of(self, name: str, rank: int) -> Iterator[Shard]:
        """The boxes of one tensor that a rank holds; may be empty."""
        at = self.layout.coordinates(rank)
        if at.pipe in self.stages(self.catalog[name]):
            yield from self._shards_of(self.catalog[name], at)

    def flat_range(self, tensor: LogicalTensor, at: Coordinates) -> tuple[int, int]:
        """The flat range of its local parameter that a rank holds; may be empty."""
        numel = self.local(tensor, at.tensor).numel
        if self.layout.zero == 0 or self.layout.data == 1:
            return 0, numel
        address = self._addresses(at.pipe)[tensor.name]
        start = address.partition * at.data - address.start
        return max(0, min(start, numel)), max(0, min(start + address.partition, numel))

    def _shards_of(self, tensor: LogicalTensor, at: Coordinates) -> Iterator[Shard]:
        local = self.local(tensor, at.tensor)
        valid = local.box.relative_to(local.box.offset)
        for box, start in flat_range_boxes(local.shape, *self.flat_range(tensor, at)):
            kept = box.intersect(valid)
            if kept is not None:
                yield Shard(tensor.name, kept.moved_by(local.box.offset), start)

    def _addresses(self, stage: int) -> Mapping[str, _Address]:
        if stage not in self._address_cache:
            self._address_cache[stage] = self._compute_addresses(stage)
        return self._address_cache[stage]

    @cached_property
    def _address_cache(self) -> dict[int, Mapping[str, _Address]]:
        return {}

    def _compute_addresses(self, stage: int) -> Mapping[str, _Address]:
        data = self.layout.data
        addresses = {}
        for _, tensors in self.groups(stage):
            sizes = [self.local(tensor, 0).numel for tensor in tensors]
            if self.layout.zero == 3:
                for tensor, size in zip(tensors, sizes, strict=True):
                    addresses[tensor.name] = _Address(0, -(-size // data))
                continue
            unit = FLAT_ALIGNMENT * data
            partition = -(-sum(sizes) // unit) * unit // data
            start = 0
            for tensor, size in zip(tensors, sizes, strict=True):
                addresses[tensor.name] = _Address(start, partition)
                start += size
        return addresses

    # --- the inverse: which ranks hold a box ----------------------------------------------

    def holders(self, name: str, box: Box) -> Iterator[tuple[int, Box]]:
        """Every rank's part of a box, replicas included: (rank, part)."""
        tensor = self.catalog[name]
        for stage in self.stages(tensor):
            for tensor_rank in self._tensor_ranks(tensor, box):
                yield from self._parts(tensor, box, stage=stage, data=None, tensor_rank=tensor_rank)

    def sources(self, name: str, box: Box, *, reader: int) -> Iterator[tuple[int, Box]]:
        """One rank for each piece of a box, `reader` itself if it holds the piece: (rank, part).

        If several ranks hold the same piece, the choice is a fixed function of `reader`, so the
        sending rank makes the same one.
        """
        tensor = self.catalog[name]
        for tensor_rank in self._tensor_ranks(tensor, box) if self.is_split(tensor) else (0,):
            stage, data, t = self.chosen(name, tensor_rank=tensor_rank, reader=reader)
            yield from self._parts(tensor, box, stage=stage, data=data, tensor_rank=t)

    def chosen(self, name: str, *, tensor_rank: int, reader: int) -> tuple[int, int | None, int]:
        """Which replica serves `reader`: (pipeline stage, data rank, tensor rank).

        The data rank is None if ZeRO partitions the tensor, because there is then only one holder.
        """
        tensor = self.catalog[name]
        me = self.layout.coordinates(reader % self.layout.world)
        stages = self.stages(tensor)
        stage = me.pipe if me.pipe in stages else stages[0]
        return (
            stage,
            me.data if self.layout.zero == 0 else None,
            tensor_rank if self.is_split(tensor) else me.tensor,
        )

    def written_by(self, rank: int) -> Iterator[Shard]:
        """The shards that this rank writes to a checkpoint; exactly one holder writes each."""
        at = self.layout.coordinates(rank)
        for index, tensor in enumerate(self.catalog):
            mine = (
                at.pipe == self.stages(tensor)[0]
                and (self.layout.zero > 0 or at.data == index % self.layout.data)
                and (self.is_split(tensor) or at.tensor == index % self.layout.tensor)
            )
            if mine:
                yield from self._shards_of(tensor, at)

    def is_split(self, tensor: LogicalTensor) -> bool:
        """Whether tensor parallelism splits this tensor."""
        return self.layout.tensor > 1 and split_axis(tensor) is not None

    def _tensor_ranks(self, tensor: LogicalTensor, box: Box) -> Sequence[int]:
        if not self.is_split(tensor):
            return range(self.layout.tensor)
        axis = split_axis(tensor)
        assert axis is not None
        size = -(-tensor.shape[axis] // self.layout.tensor)
        return range(box.offset[axis] // size, (box.stop[axis] - 1) // size + 1)

    def _parts(
        self, tensor: LogicalTensor, box: Box, *, stage: int, data: int | None, tensor_rank: int
    ) -> Iterator[tuple[int, Box]]:
        """Parts of a box on the data ranks of one (stage, tensor rank), or on rank `data`."""
        local = self.local(tensor, tensor_rank)
        wanted = box.intersect(local.box)
        if wanted is None:
            return
        meet = (data,) if data is not None else self._data_ranks(tensor, wanted, local, stage)
        parts: list[Box] = []
        for number, data_rank in enumerate(meet):
            at = Coordinates(pipe=stage, data=data_rank, tensor=tensor_rank)
            rank = self.layout.rank(pipe=stage, data=data_rank, tensor=tensor_rank)
            # Without ZeRO all data ranks, of which there may be hundreds, hold the same.
            if number == 0 or self.layout.zero > 0:
                shards = (shard.box.intersect(wanted) for shard in self._shards_of(tensor, at))
                parts = [common for common in shards if common is not None]
            for part in parts:
                yield rank, part

    def _data_ranks(
        self, tensor: LogicalTensor, wanted: Box, local: Local, stage: int
    ) -> Sequence[int]:
        """The data ranks whose flat range may intersect a box of the local parameter."""
        if self.layout.zero == 0:
            return range(self.layout.data)
        inside = wanted.relative_to(local.box.offset)
        address = self._addresses(stage)[tensor.name]
        first = address.start + flat_offset(local.shape, inside.offset)
        last = address.start + flat_offset(local.shape, [n - 1 for n in inside.stop])
        return range(first // address.partition, last // address.partition + 1)


def split_axis(tensor: LogicalTensor) -> int | None:
    """The axis that tensor parallelism splits, or None for a replicated tensor."""
    for axis, meaning in enumerate(tensor.axes):
        if meaning in SPLIT_AXES:
            return axis
    return None
