"""A checkpoint whose files hold boxes of logical tensors as contiguous ranges of bytes.

This covers nearly every format: once its directory is parsed, a `StoredSource` needs only the
list of boxes.  Reads are range reads through one buffer of a few MiB, whatever their size; if the
format has checksums, a record is checked when it is first read.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from megagrow.checkpoint.interface.format import LeftOut
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.sidecar_checksums import read_seal
from megagrow.checkpoint.interface.stored_boxes import (
    Record,
    StoredBox,
    by_slot,
    prove_tiled,
    sealed_records,
)
from megagrow.checkpoint.io.checksum import crc32
from megagrow.checkpoint.io.files import READING, RESTORE, naming, open_regular, read_exactly
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box, flat_offset, flat_range_boxes, whole
from megagrow.state.catalog import Catalog, Slot
from megagrow.state.layout import Layout

_BUFFER_BYTES = 4 << 20
_RUN_BYTES = 64 << 10  # shorter ranges are read together with their gaps


class StoredSource:
    """A `CheckpointSource` built from a list of boxes; several threads may read at once.

    Args:
        path: the checkpoint's directory.
        sizes: size in bytes of each file that holds boxes.
        boxes: they tile every slot of every tensor of `meta.catalog`, with one element type.
        records: checksums, if the format has them; sidecar checksums take precedence.
        left_out: what else the files hold; see `accounting.account`.
        zeros: element type of each (tensor, slot) that the files lack: read as zeros.
        proved: the caller has already checked that the boxes tile and are inside their files.

    Attributes:
        compare_when_read: whether reads check checksums, each once.

    Raises:
        CheckpointError: the boxes do not tile, or one exceeds its file.
    """

    def __init__(
        self,
        path: Path,
        *,
        meta: CheckpointMeta,
        step: int,
        sizes: Mapping[str, int],
        boxes: Iterable[StoredBox],
        records: Iterable[Record] = (),
        left_out: Sequence[LeftOut] = (),
        zeros: Mapping[tuple[str, str], torch.dtype] = MappingProxyType({}),
        proved: bool = False,
    ) -> None:
        self.path, self.step, self._meta = path, step, meta
        self.left_out = tuple(left_out)
        self.files = dict(sizes)
        self._number = {name: i for i, name in enumerate(self.files)}
        self.zeros = dict(zeros)
        self._stored = by_slot(path, meta, self.files, boxes, self.zeros)
        if not proved:
            prove_tiled(path, meta.catalog, self._stored)
        sealed, chunk = read_seal(path)
        if sealed:
            records = sealed_records(path, self.files, sealed, chunk)
            self.files |= {name: file.size for name, file in sealed.items()}
        self._records: dict[str, list[Record]] = {}
        for record in sorted(records, key=lambda r: (r.file, r.start)):
            self._records.setdefault(record.file, []).append(record)
        self._verified: set[Record] = set()
        self.compare_when_read = True
        self._local = threading.local()  # one buffer per thread

    @property
    def catalog(self) -> Catalog:
        """The logical tensors."""
        return self._meta.catalog

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of each tensor."""
        return self._meta.slots

    @property
    def layout(self) -> Layout:
        """The layout of the run that wrote it."""
        return self._meta.layout

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the run."""
        return self._meta.config

    @property
    def run_state(self) -> Mapping[str, Any]:
        """The training loop's state for resuming."""
        return self._meta.run_state

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints of what must be unchanged when the run resumes."""
        return self._meta.fingerprints

    def holds(self, tensor: str, slot: str) -> bool:
        """Whether a tensor has the slot."""
        return (tensor, slot) in self._stored or (tensor, slot) in self.zeros

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot."""
        if (tensor, slot) in self.zeros:
            return self.zeros[tensor, slot]
        return self._boxes(tensor, slot)[0].dtype

    def sources(self, name: str, box: Box, *, reader: int) -> Iterator[tuple[int, Box]]:
        """Which files hold a box of the first slot: (index of the file, common box)."""
        for stored, common in self._meeting(name, self.slots[0].name, box):
            yield self._number[stored.file], common

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box, in new memory or in `out`, which may have any strides.

        Raises:
            CheckpointError: there is no such box, or its file is damaged.
            ValueError: `out` has another shape or element type.
        """
        dtype = self.dtype(tensor, slot)
        if out is None:
            out = torch.empty(box.shape, dtype=dtype)
        if tuple(out.shape) != box.shape or out.dtype != dtype:
            raise ValueError(
                f"{tensor}@{slot}#{box}: out is {list(out.shape)} {out.dtype}, stored {dtype}"
            )
        if (tensor, slot) in self.zeros:
            return out.zero_()
        filled = 0
        with torch.no_grad():
            for stored, common in self._meeting(tensor, slot, box):
                self._copy(stored, common, out[common.relative_to(box.offset).slices])
                filled += common.volume
        assert filled == box.volume, f"{tensor}@{slot}#{box}: {filled} elements read"
        return out

    def verify(self) -> None:
        """Check every checksum, including those already checked; without any, check file sizes."""
        self._verified.clear()
        for name in self.files:
            self._read_bytes(name, 0, memoryview(b""))
            for record in self._records.get(name, ()):
                self._verify(record)

    @property
    def bytes(self) -> int:
        """Total size of all files with values."""
        return sum(self.files.values())

    @property
    def checksums(self) -> int:
        """Number of checksums that the format has for its values."""
        return sum(map(len, self._records.values()))

    @property
    def _buffer(self) -> torch.Tensor:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
        buffer: torch.Tensor = self._local.buffer
        return buffer

    def _boxes(self, tensor: str, slot: str) -> Sequence[StoredBox]:
        try:
            return self._stored[tensor, slot]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {tensor} with slot {slot}") from None

    def _meeting(self, tensor: str, slot: str, box: Box) -> Iterator[tuple[StoredBox, Box]]:
        boxes = self._boxes(tensor, slot)
        shape = self.catalog[tensor].shape
        if len(box.shape) != len(shape) or not whole(shape).contains(box):
            raise CheckpointError(
                f"{self.path}: tensor {tensor} has no box {box}", expected=f"inside {list(shape)}"
            )
        for stored in boxes:
            common = stored.box.intersect(box)
            if common is not None:
                yield stored, common

    def _copy(self, stored: StoredBox, common: Box, out: torch.Tensor) -> None:
        """Copy a part of a stored box to `out`, which has the part's shape."""
        axes = stored.axes or tuple(range(len(common.shape)))
        shape = tuple(stored.box.shape[axis] for axis in axes)
        part = common.relative_to(stored.box.offset)
        inside = Box(
            tuple(part.offset[axis] for axis in axes), tuple(part.shape[axis] for axis in axes)
        )
        target = out.permute(axes)
        width = stored.dtype.itemsize
        limit = _BUFFER_BYTES // width
        run = math.prod(inside.shape[_tail(shape, inside) :])
        if run * width >= _RUN_BYTES or run == inside.volume:
            done = 0
            if target.is_contiguous() and target.device.type == "cpu":
                # Not `view`: an axis of length 1 may keep an odd stride.
                flat = target.as_strided((inside.volume,), (1,))
                for start, length in _runs(shape, inside):
                    self._load(stored, start, length, flat[done : done + length].view(torch.uint8))
                    done += length
                return
            for start, length in _runs(shape, inside):
                for first in range(start, start + length, limit):
                    count = min(limit, start + length - first)
                    values = self._load(stored, first, count)
                    for box, at in flat_range_boxes(inside.shape, done, done + count):
                        block = values[at - done : at - done + box.volume]
                        target[box.slices].copy_(block.view(box.shape))
                    done += count
            return
        low = flat_offset(shape, inside.offset)
        high = flat_offset(shape, [n - 1 for n in inside.stop]) + 1
        for first in range(low, high, limit):
            count = min(limit, high - first)
            values = self._load(stored, first, count)
            for box, at in flat_range_boxes(shape, first, first + count):
                met = box.intersect(inside)
                if met is not None:
                    block = values[at - first : at - first + box.volume].view(box.shape)
                    landing = met.relative_to(inside.offset)
                    target[landing.slices].copy_(block[met.relative_to(box.offset).slices])

    def _load(
        self, stored: StoredBox, first: int, count: int, room: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Elements [first, first + count) of a stored box, into `room` (bytes) if given.

        Otherwise they are valid until the thread's next call.
        """
        width = stored.dtype.itemsize
        start = stored.start + first * width
        if self.compare_when_read:
            for record in self._touched(stored.file, start, start + count * width):
                if record not in self._verified:
                    self._verify(record, stored)
        if room is None:
            room = self._buffer[: count * width]
        self._read_bytes(stored.file, start, room.numpy().data, stored)
        return room.view(stored.dtype)

    def _touched(self, file: str, low: int, high: int) -> Iterator[Record]:
        records = self._records.get(file, ())
        index = max(0, bisect_right(records, low, key=lambda r: r.start) - 1)
        while index < len(records) and records[index].start < high:
            yield records[index]
            index += 1

    def _verify(self, record: Record, stored: StoredBox | None = None) -> None:
        crc = 0
        for start in range(record.start, record.start + record.bytes, _BUFFER_BYTES):
            count = min(_BUFFER_BYTES, record.start + record.bytes - start)
            data = self._buffer[:count].numpy().data
            self._read_bytes(record.file, start, data, stored)
            crc = crc32(data, crc)
        if crc != record.crc32:
            raise CheckpointError(
                f"{self.path / record.file}: {stored or self._at(record)}: damaged",
                found=f"{record.bytes} bytes from {record.start} on have CRC-32 {crc:08x}",
                expected=f"CRC-32 {record.crc32:08x}",
                fix=RESTORE,
            )
        self._verified.add(record)

    def _at(self, record: Record) -> str:
        """Describe the contents of a record."""
        stop = record.start + record.bytes
        met = [
            box
            for boxes in self._stored.values()
            for box in boxes
            if box.file == record.file and box.start < stop and record.start < box.start + box.bytes
        ]
        more = f" and {len(met) - 1} more boxes" if len(met) > 1 else ""
        return f"{min(met, key=lambda box: box.start) if met else 'header'}{more}"

    def _read_bytes(
        self, file: str, start: int, data: memoryview, stored: StoredBox | None = None
    ) -> None:
        path = self.path / file
        with open_regular(path) as (descriptor, size), naming(path, "cannot be read", READING):
            if size != self.files[file] or not read_exactly(descriptor, data, start):
                raise CheckpointError(
                    f"{path}: {stored or 'file'}: truncated, or changed while it is read",
                    found=f"{size} bytes",
                    expected=f"{self.files[file]} bytes",
                    fix=RESTORE,
                )


def _tail(shape: Sequence[int], inside: Box) -> int:
    """The first axis from which on a box is contiguous in a row-major array of this shape."""
    axis = len(shape)
    while axis > 0:
        axis -= 1
        if inside.shape[axis] != shape[axis]:
            break
    return axis


def _runs(shape: Sequence[int], inside: Box) -> Iterator[tuple[int, int]]:
    """The contiguous ranges of flat positions that a box covers: (first, length), ascending."""
    axis = _tail(shape, inside)
    length = math.prod(inside.shape[axis:])
    for outer in np.ndindex(*inside.shape[:axis]):
        index = [o + i for o, i in zip(inside.offset, outer, strict=False)]
        yield flat_offset(shape, [*index, *inside.offset[axis:]]), length
