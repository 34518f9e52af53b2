"""One rank's file of a checkpoint: a valid safetensors file of boxes.

    8 bytes     length of the header, little-endian
    header      JSON, padded with blanks to a multiple of 8 bytes
    values      the boxes, row-major, without holes, widest element type first

The header is a function of the boxes' list and the save's stamp (`lay_out`).
The reader makes it again from the manifest and compares bytes, so it need not
parse a header that it does not trust.

Checksums are CRC-32 of each fixed chunk of the file (header included): it is
several times as fast as SHA-256, and finds every burst of up to 32 bits and
all but one in 4e9 of other damage in a chunk.  It guards against
accidents, not against a forger, who could write new checksums as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.io.checksum import checksum
from megagrow.checkpoint.io.direct_write import page_aligned, write_past_cache
from megagrow.checkpoint.io.dtypes import DTYPE_NAMES, DTYPES
from megagrow.checkpoint.io.files import naming
from megagrow.state.boxes import Box, flat_range_boxes

_HEADER_LIMIT = 100_000_000  # the safetensors library reads no longer header


@dataclass(frozen=True)
class Piece:
    """A box of one slot of one logical tensor; `values` has the box's shape."""

    tensor: str
    slot: str
    box: Box
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """What a file says of a piece: everything but its values."""

    tensor: str
    slot: str
    box: Box
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return self.box.volume * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"tensor {self.tensor}, slot {self.slot}, box {self.box}"


@dataclass(frozen=True)
class Plan:
    """A file to be: its head (length and header) and the first byte of each part."""

    head: bytes
    starts: tuple[int, ...]
    size: int


def part_of(piece: Piece) -> Part:
    """Describe a piece.

    Raises:
        ValueError: shape and box disagree, or the element type has no name in the format.
    """
    at = f"{piece.tensor}@{piece.slot}#{piece.box}"
    if tuple(piece.values.shape) != piece.box.shape:
        raise ValueError(f"{at}: values have shape {list(piece.values.shape)}")
    if piece.values.dtype not in DTYPE_NAMES:
        raise ValueError(f"{at}: {piece.values.dtype} cannot be saved")
    return Part(piece.tensor, piece.slot, piece.box, DTYPE_NAMES[piece.values.dtype])


def file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces widest element type first, so that each starts at a multiple of its width."""
    return sorted(pieces, key=lambda piece: -piece.values.element_size())


def lay_out(parts: Sequence[Part], stamp: Mapping[str, str]) -> Plan:
    """The file of these parts, in this order, that bears this stamp.

    Raises:
        ValueError: two parts have the same key, or the header is longer than readers allow.
    """
    header: dict[str, object] = {"__metadata__": dict(stamp)}
    offsets = [0]
    for part in parts:
        key = f"{part.tensor}@{part.slot}#{part.box}"
        if key in header:
            raise ValueError(f"{part} comes twice")
        offsets.append(offsets[-1] + part.bytes)
        header[key] = {
            "dtype": part.dtype,
            "shape": list(part.box.shape),
            "data_offsets": offsets[-2:],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise ValueError(f"{len(parts)} parts make a header of {len(text)} bytes: too many")
    head = len(text).to_bytes(8, "little") + text
    starts = tuple(len(head) + offset for offset in offsets[:-1])
    return Plan(head=head, starts=starts, size=len(head) + offsets[-1])


def write_shard(path: Path, head: bytes, pieces: Iterable[Piece], *, chunk_bytes: int) -> list[str]:
    """Write a new file and push it to the disk; returns the checksum of each chunk.

    Beyond the pieces it holds one buffer of `chunk_bytes` (a multiple of 8).

    Raises:
        CheckpointError: the system refused (no space, no right, a broken disk).
    """
    with naming(path, "cannot be written"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            stream = _ChunkStream(descriptor, chunk_bytes)
            stream.put_bytes(head)
            for piece in pieces:
                stream.put(piece.values.detach())
            stream.flush()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return stream.checksums


class _ChunkStream:
    """Fills a buffer of one chunk, then sums it up and writes it."""

    def __init__(self, descriptor: int, chunk_bytes: int) -> None:
        self.checksums: list[str] = []
        self._descriptor = descriptor
        self._buffer = page_aligned(chunk_bytes)
        self._bytes = self._buffer.numpy().data
        self._filled = 0

    def put_bytes(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            taken = min(len(rest), len(self._bytes) - self._filled)
            self._bytes[self._filled : self._filled + taken] = rest[:taken]
            self._advance(taken)
            rest = rest[taken:]

    def put(self, values: torch.Tensor) -> None:
        """Append values in row-major order, whatever their strides and device."""
        width = values.element_size()
        done, total = 0, values.numel()
        while done < total:
            count = min((len(self._bytes) - self._filled) // width, total - done)
            room = self._buffer[self._filled : self._filled + count * width].view(values.dtype)
            for box, start in flat_range_boxes(tuple(values.shape), done, done + count):
                target = room[start - done : start - done + box.volume]
                target.view(box.shape).copy_(values[box.slices])
            self._advance(count * width)
            done += count

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._bytes):
            self.flush()

    def flush(self) -> None:
        if self._filled:
            data = self._bytes[: self._filled]
            self.checksums.append(checksum(data))
            write_past_cache(self._descriptor, data)
            self._filled = 0
