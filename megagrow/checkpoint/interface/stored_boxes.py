"""Where boxes of logical tensors lie in files, and the proof that they tile every tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.sidecar_checksums import FIX, SealedFile
from megagrow.checkpoint.interface.sidecar_checksums import NAME as SEAL
from megagrow.checkpoint.io.files import RESTORE
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box, tiling_fault
from megagrow.state.catalog import Catalog, slots_of


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of a slot of a logical tensor, as stored in a file.

    Attributes:
        file: path relative to the checkpoint's directory.
        start: offset of its first byte in the file.
        axes: permutation of the box's axes under which the elements are row-major, or None.
    """

    tensor: str
    slot: str
    box: Box
    file: str
    start: int
    dtype: torch.dtype
    axes: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.box.volume * self.dtype.itemsize

    def __str__(self) -> str:
        return f"tensor {self.tensor}, slot {self.slot}, box {self.box}"


@dataclass(frozen=True, slots=True)
class Record:
    """A range of a file that has a CRC-32."""

    file: str
    start: int
    bytes: int
    crc32: int


def sealed_records(
    path: Path, sizes: Mapping[str, int], sealed: Mapping[str, SealedFile], chunk: int
) -> Iterator[Record]:
    """The chunks with sidecar checksums as records (CheckpointError if a file was replaced)."""
    for name, size in sizes.items():
        if name not in sealed or sealed[name].size != size:
            raise CheckpointError(
                f"{path / name}: is not the file that {SEAL} tells of",
                found=f"{size} bytes",
                expected=f"{sealed[name].size} bytes" if name in sealed else "no such file",
                fix=FIX,
            )
    for name, file in sealed.items():
        for number, stated in enumerate(file.crc32):
            start = number * chunk
            yield Record(name, start, min(chunk, file.size - start), int(stated, 16))


def by_slot(
    path: Path,
    meta: CheckpointMeta,
    sizes: Mapping[str, int],
    boxes: Iterable[StoredBox],
    zeros: Collection[tuple[str, str]],
) -> dict[tuple[str, str], list[StoredBox]]:
    """The boxes of each (tensor, slot) that is not zeros.

    Raises:
        CheckpointError: a box is not in the catalog, or reaches outside its file.
    """
    stored: dict[tuple[str, str], list[StoredBox]] = {
        (tensor.name, slot.name): []
        for tensor in meta.catalog
        for slot in slots_of(tensor, meta.slots)
        if (tensor.name, slot.name) not in zeros
    }
    for item in boxes:
        at = f"{path / item.file}: {item}"
        if (item.tensor, item.slot) not in stored:
            raise CheckpointError(f"{at}: not in the catalog")
        if item.start < 0 or item.start + item.bytes > sizes.get(item.file, 0):
            raise CheckpointError(
                f"{at}: reaches outside its file, which may be truncated",
                found=f"bytes {item.start} to {item.start + item.bytes}",
                expected=f"inside {sizes.get(item.file, 0)} bytes",
                fix=RESTORE,
            )
        stored[item.tensor, item.slot].append(item)
    return stored


def prove_tiled(
    path: Path, catalog: Catalog, stored: Mapping[tuple[str, str], Sequence[StoredBox]]
) -> None:
    """Prove that the boxes tile every slot, with one element type (CheckpointError)."""
    for (name, slot), items in stored.items():
        fault = tiling_fault(catalog[name].shape, [item.box for item in items])
        if fault is None and len({item.dtype for item in items}) > 1:
            fault = f"element types differ: {sorted({str(item.dtype) for item in items})}"
        if fault is not None:
            raise CheckpointError(
                f"{path}: tensor {name}, slot {slot} is not stored exactly once: {fault}",
                found=", ".join(f"{i.box} in {i.file}" for i in items[:6]) or "no box at all",
                expected=f"boxes that tile shape {list(catalog[name].shape)}",
            )
