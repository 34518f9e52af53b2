"""The bytes that a growth moves, by arithmetic; memory per rank is in `memory`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.state.boxes import Box
from megagrow.state.catalog import Slot
from megagrow.state.placement import Placement
from megagrow.transfer.moves import Locator, distinct_elements, plan_receives
from megagrow.transfer.state_map import StateMap

STATE_BYTES = 4  # master parameters and optimizer state are fp32


@dataclass(frozen=True)
class Received:
    """Where one rank's new state comes from (bytes).

    Attributes:
        local: copied from the rank's own old state.
        foreign: copied from other ranks' old state; a value that is used twice counts twice.
        crossed: bytes received for it: pieces with the same source values are sent once.
        least: each value once: the lower bound of any transfer.
        by_holder: `crossed` by sending rank.
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

    The plan takes everything that the rank holds from itself, so the rest must cross.
    """
    local = foreign = 0
    by_holder: dict[int, int] = defaultdict(int)
    sent: set[tuple[str, str, Box, int]] = set()
    incoming = []
    for move in plan_receives(state_map, source, target, slots=slots, rank=rank):
        size = move.part.volume * STATE_BYTES
        if move.holder == rank:
            local += size
            continue
        foreign += size
        incoming.append(move)
        values = (move.copy.source, move.slot.name, move.source_box, move.holder)
        if values not in sent:
            sent.add(values)
            by_holder[move.holder] += size
    least = distinct_elements(incoming) * STATE_BYTES
    return Received(local, foreign, sum(by_holder.values()), least, dict(by_holder))
