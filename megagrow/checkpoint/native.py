"""Reading a native checkpoint: any box of any tensor, in bounded memory.

A file is read chunk by chunk, as it was written.  The first time that a chunk
is touched it is read whole and its checksum compared; later reads take only
the span of bytes that they need.  The boxes that a span holds are copied to
the target directly, so a read needs one chunk of memory whatever it assembles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint import manifest as manifests
from megagrow.checkpoint.contents import Contents, Stored, prove
from megagrow.checkpoint.directory import (
    READING,
    RESTORE,
    is_temporary,
    naming,
    open_regular,
    step_of,
)
from megagrow.checkpoint.manifest import file_name
from megagrow.checkpoint.shards import DTYPES, Part, checksum
from megagrow.errors import CheckpointError
from megagrow.layout import Layout
from megagrow.state.boxes import Box, flat_offset, flat_range_boxes, whole
from megagrow.state.catalog import Catalog, Slot


class NativeCheckpoint:
    """A committed checkpoint, open for reading; make one with `open`.

    Not to be used by several threads at once: reads share one buffer.
    """

    def __init__(self, path: Path, contents: Contents, *, verify: bool) -> None:
        self.path = path
        self._contents = contents
        self._manifest = contents.manifest
        self._chunks = _Chunks(path, contents, verify=verify)

    @staticmethod
    def open(path: Path, *, verify: bool = True) -> NativeCheckpoint:
        """Open a checkpoint: check the manifest, and each file's size and header.

        Args:
            verify: whether reads compare checksums (each chunk once).

        Raises:
            CheckpointError: missing, damaged, incomplete, hostile or of another version.
        """
        where = path / manifests.NAME
        if not path.is_dir() or is_temporary(path) or not os.path.lexists(where):
            raise CheckpointError(
                f"{path}: not a committed checkpoint",
                found=_looks_like(path),
                expected=f"a directory with {manifests.NAME}",
            )
        contents = prove(
            manifests.unseal(_read_small(where, manifests.BYTES_LIMIT), where=str(where)),
            where=str(where),
        )
        named = step_of(path)
        if named is not None and named != contents.manifest.step:
            raise CheckpointError(
                f"{where}: of another step than the directory's name tells",
                found=f"step {contents.manifest.step}",
                expected=f"step {named}",
            )
        for rank, record in enumerate(contents.manifest.files):
            _check_head(path / file_name(rank), record.size, contents.heads[rank])
        return NativeCheckpoint(path, contents, verify=verify)

    # --- what it is -----------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self._manifest.step

    @property
    def catalog(self) -> Catalog:
        """The logical tensors."""
        return self._contents.catalog

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What is kept of each tensor."""
        return self._contents.slots

    @property
    def layout(self) -> Layout:
        """The layout of the run that saved it."""
        return Layout(**self._manifest.layout.model_dump())

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run."""
        return self._manifest.config

    @property
    def run_state(self) -> dict[str, Any]:
        """What the training loop needs to go on."""
        return self._manifest.run_state

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of what the run must find again unchanged (tokenizer, data)."""
        return self._manifest.fingerprints

    @property
    def version(self) -> str:
        """The megagrow that wrote it."""
        return self._manifest.megagrow

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of each file of values, by name."""
        return {record.name: record.size for record in self._manifest.files}

    @property
    def bytes(self) -> int:
        """Size of all files of values together."""
        return sum(self.files.values())

    @property
    def chunks(self) -> int:
        """Number of checksums."""
        return sum(len(record.crc32) for record in self._manifest.files)

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot (raises CheckpointError where it has none)."""
        return DTYPES[self._stored(tensor, slot)[0].part.dtype]

    # --- reading --------------------------------------------------------------------------

    def sources(self, name: str, box: Box, *, reader: int) -> Iterator[tuple[int, Box]]:
        """Which files hold a box: (index of the file, common box), as `Placement.sources`.

        Every piece lies in one file, so all readers get the same answer.  Slots of a tensor
        are cut alike by every writer of ours; the answer is for the first.
        """
        for _, stored, common in self._meeting(name, self.slots[0].name, box):
            yield stored.file, common

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of any box of a tensor's slot: a tensor of the box's shape.

        Args:
            out: where to put them: any device and strides, of the stored element type.

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
        filled = 0
        with torch.no_grad():
            for target, stored, common in self._meeting(tensor, slot, box):
                filled += self._copy(stored, common, out[target.slices])
        assert filled == box.volume, f"{tensor}@{slot}#{box}: {filled} elements read"
        return out

    def verify(self) -> None:
        """Compare the checksum of every chunk of every file, those read before included.

        Raises:
            CheckpointError: names the first damaged file and the boxes in the damaged chunk.
        """
        self._chunks.verify_all()

    def _stored(self, tensor: str, slot: str) -> list[Stored]:
        try:
            return self._contents.stored[tensor, slot]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {tensor} with slot {slot}") from None

    def _meeting(self, tensor: str, slot: str, box: Box) -> Iterator[tuple[Box, Stored, Box]]:
        """Stored parts that meet a box: (place in the box, part, common box)."""
        stored = self._stored(tensor, slot)
        shape = self.catalog[tensor].shape
        if len(box.shape) != len(shape) or not whole(shape).contains(box):
            raise CheckpointError(
                f"{self.path}: tensor {tensor} has no box {box}", expected=f"inside {list(shape)}"
            )
        for item in stored:
            common = item.part.box.intersect(box)
            if common is not None:
                yield common.relative_to(box.offset), item, common

    def _copy(self, stored: Stored, common: Box, out: torch.Tensor) -> int:
        """Copy the common box out of a stored part; returns the number of elements."""
        part, size = stored.part, self._manifest.chunk_bytes
        shape, width = part.box.shape, DTYPES[part.dtype].itemsize
        inside = common.relative_to(part.box.offset)
        first = stored.start + width * flat_offset(shape, inside.offset)
        last = stored.start + width * flat_offset(shape, [n - 1 for n in inside.stop])
        copied = 0
        for chunk in range(first // size, last // size + 1):
            low = max(first, chunk * size)
            high = min(last + width, (chunk + 1) * size)
            values = self._chunks.get(stored.file, chunk, low, high).view(DTYPES[part.dtype])
            begin, end = (low - stored.start) // width, (high - stored.start) // width
            for run, start in flat_range_boxes(shape, begin, end):
                met = run.intersect(inside)
                if met is not None:
                    block = values[start - begin : start - begin + run.volume].view(run.shape)
                    target = met.relative_to(inside.offset)
                    out[target.slices].copy_(block[met.relative_to(run.offset).slices])
                    copied += met.volume
        return copied


class _Chunks:
    """Reads the files through one buffer of one chunk."""

    def __init__(self, path: Path, contents: Contents, *, verify: bool) -> None:
        self._path = path
        self._contents = contents
        self._files = contents.manifest.files
        self._size = contents.manifest.chunk_bytes
        self._verify = verify
        self._verified: set[tuple[int, int]] = set()
        self._buffer: torch.Tensor | None = None
        self._held: tuple[int, int, int, int] = (-1, -1, 0, 0)  # file, chunk, first, last + 1

    def get(self, file: int, chunk: int, low: int, high: int) -> torch.Tensor:
        """Bytes [low, high) of a file, which lie in one chunk; valid until the next call."""
        if self._verify and (file, chunk) not in self._verified:
            self._load_whole(file, chunk)
            self._verified.add((file, chunk))
        held_file, held_chunk, first, last = self._held
        if (held_file, held_chunk) != (file, chunk) or low < first or last < high:
            self._load(file, chunk, low, high)
        assert self._buffer is not None
        base = chunk * self._size
        return self._buffer[low - base : high - base]

    def verify_all(self) -> None:
        for file, record in enumerate(self._files):
            for chunk in range(len(record.crc32)):
                self._load_whole(file, chunk)

    def _load_whole(self, file: int, chunk: int) -> None:
        low = chunk * self._size
        high = min(low + self._size, self._files[file].size)
        data = self._load(file, chunk, low, high)
        if checksum(data) != self._files[file].crc32[chunk]:
            self._held = (-1, -1, 0, 0)
            raise CheckpointError(
                self._at(file, chunk) + ": damaged",
                found=f"bytes {low} to {high} do not have their checksum",
                expected=f"CRC-32 {self._files[file].crc32[chunk]}",
                mend=RESTORE,
            )

    def _load(self, file: int, chunk: int, low: int, high: int) -> memoryview:
        """Read bytes [low, high) of a file to their places in the buffer."""
        if self._buffer is None:
            longest = max(record.size for record in self._files)
            self._buffer = torch.empty(min(self._size, longest), dtype=torch.uint8)
        base = chunk * self._size
        data = self._buffer.numpy().data[low - base : high - base]
        self._held = (-1, -1, 0, 0)
        path = self._path / file_name(file)
        with open_regular(path) as (descriptor, size), naming(path, "cannot be read", READING):
            if size != self._files[file].size or not read_exactly(descriptor, data, low):
                raise CheckpointError(
                    self._at(file, chunk) + ": truncated, or changed while it is read",
                    found=f"{size} bytes",
                    expected=f"{self._files[file].size} bytes",
                    mend=RESTORE,
                )
        self._held = (file, chunk, low, high)
        return data

    def _at(self, file: int, chunk: int) -> str:
        """Names a file and what it holds in a chunk."""
        low, high = chunk * self._size, (chunk + 1) * self._size
        met = []
        for entry in self._files[file].entries:
            box = Box(tuple(entry.offset), tuple(entry.shape))
            part = Part(entry.tensor, entry.slot, box, entry.dtype)
            if entry.start < high and low < entry.start + part.bytes:
                met.append(part)
        more = f" and {len(met) - 1} more boxes" if len(met) > 1 else ""
        return f"{self._path / file_name(file)}: {met[0] if met else 'header'}{more}"


def read_exactly(descriptor: int, data: memoryview, offset: int) -> bool:
    """Fill `data` from a position of a file; False where the file ends before."""
    while data:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            return False
        data, offset = data[count:], offset + count
    return True


def _read_small(path: Path, limit: int) -> bytes:
    with open_regular(path) as (descriptor, size):
        if size > limit:
            raise CheckpointError(
                f"{path}: too long", found=f"{size} bytes", expected=f"at most {limit} bytes"
            )
        data = bytearray(size)
        with naming(path, "cannot be read", READING):
            complete = read_exactly(descriptor, memoryview(data), 0)
        if not complete:
            raise CheckpointError(f"{path}: changed while it is read")
        return bytes(data)


def _check_head(path: Path, size: int, head: bytes) -> None:
    with open_regular(path) as (descriptor, found):
        if found != size:
            raise CheckpointError(
                f"{path}: truncated, or of another checkpoint",
                found=f"{found} bytes",
                expected=f"{size} bytes",
                mend=RESTORE,
            )
        data = bytearray(len(head))
        with naming(path, "cannot be read", READING):
            complete = read_exactly(descriptor, memoryview(data), 0)
        if not complete or data != head:
            raise CheckpointError(
                f"{path}: damaged, or of another checkpoint",
                found="a header that disagrees with the manifest",
                mend=RESTORE,
            )


def _looks_like(path: Path) -> str:
    if not path.exists():
        return "nothing by that name"
    if not path.is_dir():
        return "a file"
    if is_temporary(path):
        return "a save that was never finished"
    return f"a directory without {manifests.NAME}"
