"""What a growth moves, by arithmetic alone; what a rank's memory holds is in `memory`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megagrow.state.boxes import Box
from megagrow.state.catalog import Slot
from megagrow.state.placement import Placement
from megagrow.transfer.moves import Locator, plan_receives
from megagrow.transfer.state_map import StateMap

STATE_BYTES = 4  # master parameters and optimizer state are fp32


@dataclass(frozen=True)
class Received:
    """How one rank comes by its new state (bytes).

    Attributes:
        local: copied from what the rank itself held.
        foreign: copied from what other ranks held; a value that lands twice counts twice.
        crossed: what travels for it: pieces made of the same values travel once.
        least: its values, each once: no transfer can have fewer cross.
        by_holder: `crossed` by the rank that held it.
    """

    local: int
    foreign: int
    crossed: int
    least: int
    by_holder: dict[int, int]


def received(
    state_map: StateMap, source: Locator, target: Placement, *, slots: Sequence[Slot], rank: int
) -> Received:
    """Count what a rank receives in a transfer.

    The plan takes from the rank itself whatever it holds, so the rest is what must cross.
    """
    local = foreign = 0
    by_holder: dict[int, int] = defaultdict(int)
    boxes: dict[tuple[str, str], set[tuple[Box, int]]] = defaultdict(set)
    for move in plan_receives(state_map, source, target, slots=slots, rank=rank):
        size = move.part.volume * STATE_BYTES
        if move.holder == rank:
            local += size
            continue
        foreign += size
        values = (move.source_box, move.holder)
        known = boxes[move.copy.source, move.slot.name]
        if values not in known:
            known.add(values)
            by_holder[move.holder] += size
    least = sum(union_volume(box for box, _ in found) for found in boxes.values()) * STATE_BYTES
    return Received(local, foreign, sum(by_holder.values()), least, dict(by_holder))


def union_volume(boxes: Iterable[Box]) -> int:
    """Elements that lie in at least one of some boxes of one tensor."""
    distinct = set(boxes)
    if not distinct:
        return 0
    starts = np.array([box.offset for box in distinct], dtype=np.int64)
    stops = np.array([box.stop for box in distinct], dtype=np.int64)
    if starts.shape[1] == 0:
        return 1
    # On the grid of all their edges every box is a block of whole cells.
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
