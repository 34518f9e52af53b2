"""Compare duplicate values in a checkpoint before one copy is ignored."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.io.files import READING, RESTORE, naming, open_regular, read_exactly
from megagrow.errors import CheckpointError

_ELEMENTS = 1 << 20  # elements compared at a time


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two row-major tensors hold the same values, in bounded memory.

    Equal element types are compared bit for bit, different ones in the wider type.

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


def require_frequencies(stored: StoredTensor, expected: torch.Tensor, *, at: str) -> None:
    """Check that stored rotary frequencies are the model's, fp64, up to bf16 rounding.

    Raises:
        CheckpointError: they differ; `at` is the start of the message.
    """
    right_shape = stored.shape == tuple(expected.shape)
    if not right_shape or not torch.allclose(
        torch.cat(list(_blocks(stored))).double(), expected, rtol=0.01, atol=0.0
    ):
        raise CheckpointError(
            f"{at}: not the rotary frequencies that the configuration describes",
            found="other values" if right_shape else f"shape {list(stored.shape)}",
            expected=f"{len(expected)} frequencies from {expected[0]:g} to {expected[-1]:g}",
        )


def _blocks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    assert tensor.axes is None
    width = tensor.dtype.itemsize
    with open_regular(tensor.path) as (file, _), naming(tensor.path, "cannot be read", READING):
        for first in range(0, tensor.numel, _ELEMENTS):
            data = bytearray(width * min(_ELEMENTS, tensor.numel - first))
            if not read_exactly(file, memoryview(data), tensor.start + first * width):
                raise CheckpointError(f"{tensor.path}: truncated", fix=RESTORE)
            yield torch.frombuffer(data, dtype=tensor.dtype)
