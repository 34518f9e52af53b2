"""Check that a manifest accounts for everything exactly once.

File names are not taken from the manifest but compared with what they must be; the first byte of
each box and the header of each file are recomputed, not trusted; and the boxes must tile every
slot of every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagrow.checkpoint.io.checksum import checksum_count
from megagrow.checkpoint.io.dtypes import DTYPES
from megagrow.checkpoint.native.manifest import FileRecord, Manifest, file_name, stamp
from megagrow.checkpoint.native.shard_file import Part, lay_out
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box, tiling_fault, whole
from megagrow.state.catalog import Catalog, Slot, slots_of


@dataclass(frozen=True, slots=True)
class Stored:
    """The position of a part: file (by index), first byte."""

    file: int
    start: int
    part: Part


@dataclass(frozen=True)
class Contents:
    """A manifest whose claims are consistent.

    Attributes:
        stored: by (tensor, slot), the parts that tile it, in ascending order of their boxes.
        heads: the bytes with which each file must start.
    """

    manifest: Manifest
    catalog: Catalog
    slots: tuple[Slot, ...]
    stored: Mapping[tuple[str, str], list[Stored]]
    heads: tuple[bytes, ...]


def prove(manifest: Manifest, *, where: str) -> Contents:
    """Check that files, offsets, sizes and boxes agree and tile every slot of every tensor.

    Raises:
        CheckpointError: names the file, the tensor, the slot and the box at fault.
    """
    catalog, slots = _catalog(manifest, where), _slots(manifest, where)
    if manifest.world != len(manifest.files):
        raise CheckpointError(
            f"{where}: a file is missing or too many",
            found=f"{len(manifest.files)} files",
            expected=f"one of each of {manifest.world} ranks",
        )
    stored: dict[tuple[str, str], list[Stored]] = {
        (tensor.name, slot.name): [] for tensor in catalog for slot in slots_of(tensor, slots)
    }
    heads = []
    for rank, record in enumerate(manifest.files):
        heads.append(_prove_file(manifest, rank, record, catalog, stored, where))
    for (name, slot), parts in stored.items():
        parts.sort(key=lambda s: s.part.box)
        fault = tiling_fault(catalog[name].shape, [s.part.box for s in parts])
        if fault is None and len({s.part.dtype for s in parts}) > 1:
            fault = f"element types differ: {sorted({s.part.dtype for s in parts})}"
        if fault is not None:
            raise CheckpointError(
                f"{where}: tensor {name}, slot {slot} is not stored exactly once: {fault}",
                found=_boxes_and_files(manifest, parts),
                expected=f"boxes that tile shape {list(catalog[name].shape)}",
            )
    return Contents(manifest, catalog, slots, stored, tuple(heads))


def _catalog(manifest: Manifest, where: str) -> Catalog:
    try:
        return Catalog.from_json(tensor.model_dump() for tensor in manifest.catalog)
    except ValueError as error:
        raise CheckpointError(f"{where}: catalog: {error}") from None


def _slots(manifest: Manifest, where: str) -> tuple[Slot, ...]:
    slots = tuple(Slot(record.name, record.kind, record.matrices) for record in manifest.slots)
    if len({slot.name for slot in slots}) != len(slots):
        raise CheckpointError(f"{where}: slots: two have the same name")
    return slots


def _prove_file(
    manifest: Manifest,
    rank: int,
    record: FileRecord,
    catalog: Catalog,
    stored: dict[tuple[str, str], list[Stored]],
    where: str,
) -> bytes:
    """Add a file's parts to `stored`; returns the header that the file must have."""
    at = f"{where}: file {file_name(rank)}"
    if record.name != file_name(rank):
        raise CheckpointError(f"{at}: has the wrong name", found=repr(record.name[:200]))
    parts = []
    for entry in record.entries:
        box = Box(tuple(entry.offset), tuple(entry.shape))
        if (entry.tensor, entry.slot) not in stored:
            raise CheckpointError(
                f"{at}: tensor {entry.tensor}, slot {entry.slot} is not in the catalog"
            )
        shape = catalog[entry.tensor].shape
        spans = len(entry.offset) == len(entry.shape) == len(shape)
        if not spans or not whole(shape).contains(box):
            raise CheckpointError(
                f"{at}: tensor {entry.tensor}, slot {entry.slot}: a box is outside the tensor",
                found=f"offset {entry.offset}, shape {entry.shape}",
                expected=f"inside shape {list(shape)}",
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{at}: tensor {entry.tensor}, slot {entry.slot}, box {box}: element type",
                found=repr(entry.dtype[:40]),
                expected=", ".join(DTYPES),
            )
        parts.append(Part(entry.tensor, entry.slot, box, entry.dtype))
    try:
        plan = lay_out(parts, stamp(save=manifest.save, step=manifest.step, rank=rank))
    except ValueError as error:
        raise CheckpointError(f"{at}: {error}") from None
    for part, entry, start in zip(parts, record.entries, plan.starts, strict=True):
        if entry.start != start:
            raise CheckpointError(
                f"{at}: {part} overlaps another or leaves a hole",
                found=f"first byte {entry.start}",
                expected=f"first byte {start}",
            )
        stored[part.tensor, part.slot].append(Stored(rank, start, part))
    if record.size != plan.size:
        raise CheckpointError(
            f"{at}: size does not agree with its boxes",
            found=f"{record.size} bytes",
            expected=f"{plan.size} bytes",
        )
    if len(record.crc32) != checksum_count(record.size, manifest.chunk_bytes):
        raise CheckpointError(
            f"{at}: number of checksums",
            found=len(record.crc32),
            expected=checksum_count(record.size, manifest.chunk_bytes),
        )
    return plan.head


def _boxes_and_files(manifest: Manifest, parts: Sequence[Stored]) -> str:
    shown = [f"{s.part.box} in {file_name(s.file)}" for s in parts[:6]]
    rest = len(parts) - len(shown)
    return ", ".join(shown + ([f"and {rest} more"] if rest else [])) or "no box at all"
