"""One rank's file of a checkpoint: a valid safetensors file of boxes.

    8 bytes     length of the header, little-endian
    header      JSON, padded with spaces to a multiple of 8 bytes
    values      the boxes, row-major, without gaps, widest element type first

The header is a function of the list of boxes and the save's stamp (`lay_out`).
The reader rebuilds it from the manifest and compares bytes, so it never
parses a header that it does not trust.

Checksums are CRC-32 of each fixed-size chunk of the file (header included): it is
several times as fast as SHA-256, and detects every burst of up to 32 bits and
all but one in 4e9 of other damage in a chunk.  It guards against
accidents, not against a forger, who could write new checksums as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.interface.file_writer import LEAST_BUFFER_BYTES, write_piece
from megagrow.checkpoint.interface.format import FilePlan, Values, cut
from megagrow.checkpoint.io.dtypes import DTYPE_NAMES, DTYPES
from megagrow.state.boxes import Box

_HEADER_LIMIT = 100_000_000  # longer headers are rejected by the safetensors library


@dataclass(frozen=True)
class Piece:
    """A box of one slot of one logical tensor; `values` has the box's shape."""

    tensor: str
    slot: str
    box: Box
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """The description of a piece: everything but its values."""

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
class ShardPlan:
    """A file to be written: its head (length and header) and the first byte of each part."""

    head: bytes
    starts: tuple[int, ...]
    size: int


def part_of(piece: Piece) -> Part:
    """Describe a piece.

    Raises:
        ValueError: shape and box disagree, or the format has no name for the element type.
    """
    at = f"{piece.tensor}@{piece.slot}#{piece.box}"
    if tuple(piece.values.shape) != piece.box.shape:
        raise ValueError(f"{at}: values have shape {list(piece.values.shape)}")
    if piece.values.dtype not in DTYPE_NAMES:
        raise ValueError(f"{at}: {piece.values.dtype} cannot be saved")
    return Part(piece.tensor, piece.slot, piece.box, DTYPE_NAMES[piece.values.dtype])


def file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Sort pieces by element width, widest first, so that each is aligned to its width."""
    return sorted(pieces, key=lambda piece: -piece.values.element_size())


def lay_out(parts: Sequence[Part], stamp: Mapping[str, str]) -> ShardPlan:
    """Plan a file of these parts, in this order, with this stamp.

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
    return ShardPlan(head=head, starts=starts, size=len(head) + offsets[-1])


class Pieces:
    """A rank's pieces as the `Boxes` that a file is written from."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault((piece.tensor, piece.slot), []).append(piece)

    def holds(self, tensor: str, slot: str) -> bool:
        """Whether there is a piece of the slot."""
        return (tensor, slot) in self._pieces

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of the pieces."""
        return self._pieces[tensor, slot][0].values.dtype

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A part of a piece; it may be on any device, with any strides."""
        piece = next(p for p in self._pieces[tensor, slot] if p.box.contains(box))
        values = piece.values.detach()[box.relative_to(piece.box.offset).slices]
        return values if out is None else out.copy_(values)


def write_shard(path: Path, head: bytes, pieces: Sequence[Piece], *, chunk_bytes: int) -> list[str]:
    """Write a rank's file and fsync it; returns the checksum of each chunk.

    Besides the pieces it needs one buffer of `chunk_bytes` (a multiple of 8).

    Raises:
        CheckpointError: a system call failed (no space, no permission, a broken disk).
    """
    values = [Values(p.tensor, p.slot, p.box, p.values.dtype) for p in pieces]
    (whole,) = cut(FilePlan(path.name, [head, *values]), sys.maxsize)
    return write_piece(
        path, whole, Pieces(pieces), buffer_bytes=LEAST_BUFFER_BYTES, chunk_bytes=chunk_bytes
    )
