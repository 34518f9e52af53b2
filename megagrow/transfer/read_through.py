"""Reading through a state map: any box of the state that it would make, without making the rest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from megagrow.state.boxes import Box
from megagrow.state.catalog import Slot
from megagrow.state.placement import Shard
from megagrow.transfer.ends import Reader
from megagrow.transfer.execute import transfer_from_storage
from megagrow.transfer.moves import Locator
from megagrow.transfer.state_map import StateMap
from megagrow.transfer.statistics import Statistics, measure, required


class Through:
    """A state map over stored state, as a reader of what it makes.

    Args:
        state_map: what is made.
        old: the state that it is made of.
        locator: who holds the boxes of `old`.
        seed: of the run, for values that are made afresh.
        staging_bytes: memory for a read besides the box itself.
    """

    def __init__(
        self, state_map: StateMap, old: Reader, locator: Locator, *, seed: int, staging_bytes: int
    ) -> None:
        self._state_map, self._old, self._locator = state_map, old, locator
        self._seed, self._staging_bytes = seed, staging_bytes

    def read(self, tensor: str, slot: Slot, box: Box, *, dtype: torch.dtype) -> torch.Tensor:
        """The values of a box of a target tensor's slot, bit for bit those of a transfer."""
        one = _OneBox(tensor, box, torch.empty(box.shape, dtype=dtype))
        transfer_from_storage(
            state_map=self._state_map,
            old=self._old,
            locator=self._locator,
            new=one,
            new_placement=one,
            slots=(slot,),
            rank=0,
            seed=self._seed,
            staging_bytes=self._staging_bytes,
            statistics=self._statistics,
        )
        return one.memory

    @cached_property
    def _statistics(self) -> Statistics:
        return measure(
            required(self._state_map),
            old=self._old,
            locator=self._locator,
            staging_bytes=self._staging_bytes,
        )


class _OneBox:
    """A target that is one box."""

    def __init__(self, tensor: str, box: Box, memory: torch.Tensor) -> None:
        self.tensor, self.box, self.memory = tensor, box, memory

    def shards(self, rank: int) -> Iterator[Shard]:
        """The box."""
        yield Shard(self.tensor, self.box, 0)

    def view(self, tensor: str, slot: str, box: Box) -> torch.Tensor:
        """The memory of a part of the box."""
        return self.memory[box.relative_to(self.box.offset).slices]
