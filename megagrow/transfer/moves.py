"""The transfer plan: which rank sends which piece to which rank, computed without communication.

A rank works out what it receives from the boxes it needs, and what it sends
from the boxes it has.  Both sides give a piece the same key and split it the same way, so they
agree on every message without communication.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megagrow.state.boxes import Box, split_box, union_volume
from megagrow.state.catalog import Slot
from megagrow.state.placement import Placement, Shard
from megagrow.transfer.state_map import AxisMap, Copy, StateMap


class Locator(Protocol):
    """What planning needs from a source: a placement, or the index of a checkpoint."""

    def sources(self, name: str, box: Box, *, reader: int) -> Iterator[tuple[int, Box]]:
        """One holder for each piece of a box: (holder, piece)."""
        ...


class Holder(Protocol):
    """What planning needs from a target: a placement, or a single box."""

    def shards(self, rank: int) -> Iterator[Shard]:
        """All boxes that a rank holds."""
        ...


@dataclass(frozen=True, slots=True)
class Move:
    """One piece of a block, to be moved from a holder to a rank.

    `part` is in block coordinates; `target_box` and `source_box` are the smallest
    boxes around it on either side, `index` is (target tensor, slot, block).  `twins` are other
    pieces for the same rank that use the same source elements (see `merged`).
    """

    index: tuple[int, int, int]
    tensor: str
    slot: Slot
    copy: Copy
    part: Box
    holder: int
    receiver: int
    twins: tuple[Move, ...] = ()

    @property
    def key(self) -> tuple[tuple[int, int, int], Box]:
        """Sort key: orders the pieces of a message identically on both sides."""
        return self.index, self.part

    @property
    def target_box(self) -> Box:
        """The smallest target box around the piece."""
        return self.copy.target_hull(self.part)

    @property
    def source_box(self) -> Box:
        """The smallest source box around the piece."""
        return self.copy.source_hull(self.part)

    def target_index(self) -> tuple[slice, ...]:
        """The piece's elements inside a view of `target_box`."""
        return self.copy.target_slices(self.part, self.target_box.offset)

    def source_index(self) -> tuple[slice, ...]:
        """The piece's elements inside a view of `source_box`."""
        return self.copy.source_slices(self.part, self.source_box.offset)


def plan_receives(
    state_map: StateMap, source: Locator, target: Holder, *, slots: Sequence[Slot], rank: int
) -> Iterator[Move]:
    """Every piece that `rank` needs, each from one holder."""
    number = {tensor.name: i for i, tensor in enumerate(state_map.target)}
    for shard in target.shards(rank):
        tensor = state_map.target[shard.tensor]
        # The slots of a tensor usually have the same blocks, up to coefficients.
        pieces: dict[tuple[str, tuple[AxisMap, ...]], list[tuple[int, Box]]] = {}
        for s, slot in enumerate(slots):
            if not slot.of(tensor):
                continue
            for c, copy in enumerate(state_map.copies(tensor, slot)):
                block = copy.source, copy.axes
                if block not in pieces:
                    pieces[block] = list(_received(copy, shard.box, source, rank))
                index = (number[tensor.name], s, c)
                for holder, part in pieces[block]:
                    yield Move(index, tensor.name, slot, copy, part, holder, rank)


def _received(copy: Copy, box: Box, source: Locator, rank: int) -> Iterator[tuple[int, Box]]:
    """The pieces of a block that land in a target box of a rank: (holder, piece)."""
    needed = copy.from_target(box)
    if needed is None:
        return
    for holder, found in source.sources(copy.source, copy.source_hull(needed), reader=rank):
        fed = copy.from_source(found)
        part = fed.intersect(needed) if fed else None
        if part is not None:
            yield holder, part


def plan_sends(
    state_map: StateMap, source: Placement, target: Placement, *, slots: Sequence[Slot], rank: int
) -> Iterator[Move]:
    """Every piece that `rank` sends, to other ranks and to itself."""
    at = source.layout.coordinates(rank)
    feeds: dict[str, list[tuple[tuple[int, int, int], str, Slot, Copy]]] = {}
    for t, tensor in enumerate(state_map.target):
        for s, slot in enumerate(slots):
            if not slot.of(tensor):
                continue
            for c, copy in enumerate(state_map.copies(tensor, slot)):
                feeds.setdefault(copy.source, []).append(((t, s, c), tensor.name, slot, copy))
    for shard in source.shards(rank):
        served: dict[int, bool] = {}  # whether this rank serves a receiver
        pieces: dict[tuple[str, tuple[AxisMap, ...]], list[tuple[int, Box]]] = {}
        for index, name, slot, copy in feeds.get(shard.tensor, ()):
            block = name, copy.axes
            if block not in pieces:
                pieces[block] = list(_landing(copy, shard.box, name, target))
            for receiver, part in pieces[block]:
                if receiver not in served:
                    stage, data, tensor_rank = source.chosen(
                        shard.tensor, tensor_rank=at.tensor, reader=receiver
                    )
                    served[receiver] = (stage, tensor_rank) == (at.pipe, at.tensor) and (
                        data in (None, at.data)
                    )
                if served[receiver]:
                    yield Move(index, name, slot, copy, part, rank, receiver)


def _landing(copy: Copy, box: Box, name: str, target: Placement) -> Iterator[tuple[int, Box]]:
    """The pieces of a block that are read from a source box: (receiver, piece)."""
    given = copy.from_source(box)
    if given is None:
        return
    for receiver, found in target.holders(name, copy.target_hull(given)):
        landed = copy.from_target(found)
        part = landed.intersect(given) if landed else None
        if part is not None:
            yield receiver, part


def merged(moves: Iterable[Move]) -> list[Move]:
    """Deduplicate: send source elements that several pieces share only once.

    Of the pieces with the same source elements (the copies of a width growth), the first carries
    the others as its twins.
    """
    first: dict[tuple[object, ...], list[Move]] = {}
    for move in sorted(moves, key=lambda m: m.key):
        steps = tuple(axis.source_step for axis in move.copy.axes)
        same = (move.copy.source, move.slot.name, move.source_box, steps)
        first.setdefault(same, []).append(move)
    return [replace(move, twins=tuple(twins)) for move, *twins in first.values()]


def messages(moves: Sequence[Move], limit: int) -> list[list[Move]]:
    """Cut the pieces between two ranks into messages of at most `limit` elements.

    Pieces are sorted by key; one that is longer than a message is split.
    """
    packed: list[list[Move]] = []
    space = 0
    for move in sorted(moves, key=lambda m: m.key):
        for part in split_box(move.part, limit):
            if part.volume > space:
                packed.append([])
                space = limit
            piece = move if part == move.part else _narrowed(move, part)
            packed[-1].append(piece)
            space -= part.volume
    return packed


def _narrowed(move: Move, part: Box) -> Move:
    inside = part.relative_to(move.part.offset)
    twins = (_narrowed(twin, inside.moved_by(twin.part.offset)) for twin in move.twins)
    return replace(move, part=part, twins=tuple(twins))


def distinct_elements(moves: Iterable[Move]) -> int:
    """Number of distinct source elements of some moves: no transfer can send fewer."""
    boxes: dict[tuple[str, str], set[Box]] = defaultdict(set)
    for move in moves:
        boxes[move.copy.source, move.slot.name].add(move.source_box)
    return sum(map(union_volume, boxes.values()))
