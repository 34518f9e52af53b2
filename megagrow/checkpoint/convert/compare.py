"""Compare a converted checkpoint with its source, value by value."""

from __future__ import annotations

import torch

from megagrow.checkpoint.interface.file_writer import as_bytes, blocks
from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.errors import CheckpointError
from megagrow.state.boxes import whole


def compare(
    old: CheckpointSource, new: CheckpointSource, tensor: str, slot: str, *, buffer_bytes: int
) -> tuple[int, float]:
    """Compare a slot of a tensor; a slot that `old` lacks must be zeros in `new`.

    Returns:
        If the element types differ: the number of values that rounding changed, and the
        greatest change relative to the greatest absolute value of the tensor.  Else (0, 0.0).

    Raises:
        CheckpointError: a value differs from the old one or from its rounding.
    """
    held = slot in {s.name for s in old.slots}
    kind = new.dtype(tensor, slot)
    width = max(kind.itemsize, old.dtype(tensor, slot).itemsize if held else 0, 4)
    changed, greatest, largest = 0, 0.0, 0.0
    for box in blocks(whole(new.catalog[tensor].shape), width, buffer_bytes // 8):
        found = new.read(tensor, slot, box)
        source = old.read(tensor, slot, box) if held else torch.zeros(box.shape)
        rounded = source.to(kind)
        if not torch.equal(as_bytes(found, kind), as_bytes(rounded, kind)):
            raise CheckpointError(
                f"{new.path}: tensor {tensor}, slot {slot}, box {box}: not what was converted",
                expected=f"the values of {old.path}",
                fix="convert again; if it recurs, look at the disk and the memory of this host",
            )
        if source.dtype != kind:
            wide = torch.promote_types(source.dtype, torch.float32)
            difference = (source.to(wide) - rounded.to(wide)).abs()
            changed += int(torch.count_nonzero(difference))
            greatest = max(greatest, float(difference.max()))
            largest = max(largest, float(source.abs().max()))
    return changed, greatest / largest if largest else 0.0
