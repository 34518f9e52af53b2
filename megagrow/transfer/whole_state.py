"""Training state as whole tensors in one process: for tests, tools and offline growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megagrow.state.boxes import Box
from megagrow.state.catalog import Catalog, Slot


class MemoryState:
    """Whole logical tensors that can be read and written box by box.

    Args:
        tensors: memory by (tensor name, slot name), each of the logical tensor's shape.
    """

    def __init__(self, tensors: Mapping[tuple[str, str], torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    @staticmethod
    def empty(
        catalog: Catalog, slots: Sequence[Slot], *, dtype: torch.dtype = torch.float32
    ) -> MemoryState:
        """New memory for every slot, NaN-filled so that gaps show."""
        return MemoryState(
            {
                (tensor.name, slot.name): torch.full(tensor.shape, torch.nan, dtype=dtype)
                for tensor in catalog
                for slot in slots
            }
        )

    def view(self, tensor: str, slot: str, box: Box) -> torch.Tensor:
        """The memory of a box."""
        return self.tensors[tensor, slot][box.slices]

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot."""
        return self.tensors[tensor, slot].dtype

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box, as a view or in `out`."""
        values = self.view(tensor, slot, box)
        return values if out is None else out.copy_(values)
