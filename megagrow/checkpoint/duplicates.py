"""What a checkpoint holds twice: compared before one of the two is passed by."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megagrow.checkpoint.directory import READING, RESTORE, naming, open_regular, read_exactly
from megagrow.checkpoint.pickles import StoredTensor
from megagrow.errors import CheckpointError

_ELEMENTS = 1 << 20  # compared at a time


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two row-major tensors hold the same values, in memory bounded by a constant.

    Of one element type they are compared bit for bit, of two as the wider one.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if a.shape != b.shape:
        return False
    if (a.path, a.start, a.dtype) == (b.path, b.start, b.dtype):
        return True
    for left, right in zip(_blocks(a), _blocks(b), strict=True):
        if a.dtype == b.dtype:
            left, right = left.view(torch.uint8), right.view(torch.uint8)
        wide = torch.promote_types(left.dtype, right.dtype)
        if not torch.equal(left.to(wide), right.to(wide)):
            return False
    return True


def read_values(tensor: StoredTensor) -> torch.Tensor:
    """All values of a small tensor, in its shape (CheckpointError)."""
    return torch.cat(list(_blocks(tensor)) or [torch.empty(0, dtype=tensor.dtype)]).view(
        tensor.shape
    )


def _blocks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    assert tensor.axes is None
    width = tensor.dtype.itemsize
    with open_regular(tensor.path) as (file, _), naming(tensor.path, "cannot be read", READING):
        for first in range(0, tensor.numel, _ELEMENTS):
            data = bytearray(width * min(_ELEMENTS, tensor.numel - first))
            if not read_exactly(file, memoryview(data), tensor.start + first * width):
                raise CheckpointError(f"{tensor.path}: truncated", mend=RESTORE)
            yield torch.frombuffer(data, dtype=tensor.dtype)
