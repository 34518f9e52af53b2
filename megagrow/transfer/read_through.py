"""Read through a state map: any box of the resulting state, without computing the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch

from megagrow.state.boxes import Box
from megagrow.state.catalog import Slot
from megagrow.state.placement import Shard
from megagrow.transfer.ends import Source
from megagrow.transfer.execute import transfer_from_storage
from megagrow.transfer.moves import Locator
from megagrow.transfer.state_map import StateMap
from megagrow.transfer.statistics import Statistics, measure, required


class Through:
    """Stored state seen through a state map, as a source; several threads may read at once.

    Args:
        state_map: defines the resulting state.
        old: the stored state.
        locator: which holder has which boxes of `old`.
        slots: the slots of the resulting state.
        dtype: the dtype of a (tensor, slot) of the resulting state.
        seed: the run's seed, for freshly initialised values.
        staging_bytes: memory that a read may use in addition to the box itself.
    """

    def __init__(
        self,
        state_map: StateMap,
        old: Source,
        locator: Locator,
        *,
        slots: tuple[Slot, ...],
        dtype: Callable[[str, str], torch.dtype],
        seed: int,
        staging_bytes: int,
    ) -> None:
        self._state_map, self._old, self._locator = state_map, old, locator
        self._slots, self.dtype = {slot.name: slot for slot in slots}, dtype
        self._seed, self._staging_bytes = seed, staging_bytes
        self._measured: Statistics | None = None
        self._lock = threading.Lock()

    def holds(self, tensor: str, slot: str) -> bool:
        """Whether a tensor has the slot."""
        return slot in self._slots and self._slots[slot].of(self._state_map.target[tensor])

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box of a target tensor's slot, bit-identical to those of a transfer."""
        if out is None:
            out = torch.empty(box.shape, dtype=self.dtype(tensor, slot))
        wide = out
        if out.dtype.itemsize < 4 and self._sums(tensor, slot):
            wide = torch.empty(box.shape, dtype=torch.float32)  # sums are rounded once
        one = _OneBox(tensor, box, wide)
        transfer_from_storage(
            state_map=self._state_map,
            old=self._old,
            locator=self._locator,
            new=one,
            new_placement=one,
            slots=(self._slots[slot],),
            rank=0,
            seed=self._seed,
            staging_bytes=self._staging_bytes,
            statistics=self._statistics(),
        )
        return out if wide is out else out.copy_(wide)

    def _sums(self, tensor: str, slot: str) -> bool:
        """Whether some elements are sums of several source elements."""
        copies = self._state_map.copies(self._state_map.target[tensor], self._slots[slot])
        return any(copy.term for copy in copies)

    def _statistics(self) -> Statistics:
        with self._lock:
            if self._measured is None:
                self._measured = measure(
                    required(self._state_map),
                    old=self._old,
                    locator=self._locator,
                    staging_bytes=self._staging_bytes,
                )
            return self._measured


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
