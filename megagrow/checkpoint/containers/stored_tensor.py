"""Where a tensor's values are in a file: what a reader of pickles returns in their stead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.io.files import READING, RESTORE, naming, open_regular, read_exactly
from megagrow.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file: contiguous from its first byte.

    Attributes:
        start: offset of its first byte in the file.
        axes: the order of its axes in memory, or None for row-major.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def item(self) -> float:
        """The value of a one-element tensor (raises CheckpointError, ValueError)."""
        if self.numel != 1:
            raise ValueError(f"{self.path}: a tensor of shape {list(self.shape)} is no number")
        data = bytearray(self.dtype.itemsize)
        with open_regular(self.path) as (file, _), naming(self.path, "cannot be read", READING):
            if not read_exactly(file, memoryview(data), self.start):
                raise CheckpointError(f"{self.path}: truncated", fix=RESTORE)
        return float(torch.frombuffer(data, dtype=self.dtype).item())


@dataclass(frozen=True)
class PickledRange:
    """The range of a file that holds a storage's values."""

    start: int
    size: int
    crc: int
