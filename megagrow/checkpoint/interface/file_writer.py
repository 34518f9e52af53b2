"""Write a planned file, or a piece of it, from a source in bounded memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from megagrow.checkpoint.interface.format import FilePiece, Late, Mark, Values, Zeros
from megagrow.checkpoint.io.checksum import CHUNK_BYTES, checksum, crc32
from megagrow.checkpoint.io.direct_write import page_aligned, write_past_cache
from megagrow.checkpoint.io.files import naming
from megagrow.state.boxes import Box, flat_range_boxes, split_box

_READ_BYTES = 4 << 20  # working memory of sources and of the comparison
LEAST_BUFFER_BYTES = CHUNK_BYTES + 2 * _READ_BYTES


class Boxes(Protocol):
    """Provides the values of a file: a `CheckpointSource`, or the live state of a rank."""

    def holds(self, tensor: str, slot: str) -> bool:
        """Whether it has the slot; if not, zeros are written."""

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot."""

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box, in `out` if given."""


def write_piece(
    path: Path,
    piece: FilePiece,
    source: Boxes,
    *,
    buffer_bytes: int,
    chunk_bytes: int = CHUNK_BYTES,
    moved: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Write a piece of a file and fsync it; returns the CRC-32 of each chunk.

    The file is created if it does not exist.

    Args:
        buffer_bytes: memory for values, at least `LEAST_BUFFER_BYTES`.
        chunk_bytes: size of the checksums' chunks, a multiple of 8.
        moved: called with the number of bytes after each write.

    Raises:
        CheckpointError: the source is damaged, or a system call failed.
    """
    with naming(path, "cannot be written"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with naming(path, "cannot be written"):
            os.ftruncate(descriptor, piece.file_bytes)
            os.lseek(descriptor, piece.start, os.SEEK_SET)
        stream = _Stream(path, descriptor, source, buffer_bytes, chunk_bytes, moved)
        for segment in piece.segments:
            stream.put(segment)
        stream.flush()
        with naming(path, "cannot be written"):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return stream.checksums


def as_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values as bytes, row-major, so that NaN equals itself and 0.0 differs from -0.0."""
    # Not `contiguous`: an axis of length 1 may keep an odd stride, which `view` rejects.
    copied = torch.empty(values.shape, dtype=dtype).copy_(values)
    return copied.view(-1).view(torch.uint8)


def blocks(box: Box, bytes_an_element: int, limit: int) -> Iterator[Box]:
    """Cut a box into pieces of at most `limit` bytes (and at least one element)."""
    yield from split_box(box, max(1, limit // bytes_an_element))


_rooms = threading.local()


def _buffer_of_this_thread(chunk_bytes: int) -> torch.Tensor:
    """A thread-local buffer for one chunk, reused because fresh memory is slow to allocate."""
    buffer: torch.Tensor | None = getattr(_rooms, "buffer", None)
    if buffer is None or len(buffer) != chunk_bytes:
        buffer = _rooms.buffer = page_aligned(chunk_bytes)
    return buffer


class _Stream:
    """Fills a buffer of one chunk, then checksums and writes it."""

    def __init__(
        self,
        path: Path,
        descriptor: int,
        source: Boxes,
        buffer_bytes: int,
        chunk_bytes: int,
        moved: Callable[[int], None],
    ) -> None:
        self.checksums: list[str] = []
        self._path, self._descriptor, self._source, self._moved = path, descriptor, source, moved
        self._buffer = _buffer_of_this_thread(chunk_bytes)
        self._bytes = self._buffer.numpy().data
        # A converted block is held twice: as read and as written.
        self._block_bytes = (buffer_bytes - chunk_bytes - _READ_BYTES) // 2
        self._filled = self._summed = 0
        self._crc: int | None = None  # of the current record
        self._crcs: list[int] = []

    def put(self, segment: bytes | Values | Zeros | Mark | Late) -> None:
        if isinstance(segment, Values):
            self._put_values(segment)
        elif isinstance(segment, Zeros):
            self._put_zeros(segment.bytes)
        elif isinstance(segment, bytes):
            self._put_bytes(memoryview(segment))
        else:
            self._end_record()
            if isinstance(segment, Mark):
                self._crc = 0
            else:
                data = segment.make(tuple(self._crcs))
                assert len(data) == segment.bytes, f"{self._path}: a segment has the wrong size"
                self._put_bytes(memoryview(data))

    def _put_values(self, values: Values) -> None:
        if not self._source.holds(values.tensor, values.slot):
            return self._put_zeros(values.bytes)
        stored = self._source.dtype(values.tensor, values.slot)
        if values.axes is None and stored == values.dtype and self._aligned(stored.itemsize):
            return self._read_straight(values)
        axes = values.axes or tuple(range(len(values.box.shape)))
        permuted = Box(
            tuple(values.box.offset[axis] for axis in axes),
            tuple(values.box.shape[axis] for axis in axes),
        )
        width = max(stored.itemsize, values.dtype.itemsize)
        for block in blocks(permuted, width, self._block_bytes):
            origin, shape = [0] * len(axes), [0] * len(axes)
            for place, axis in enumerate(axes):
                origin[axis], shape[axis] = block.offset[place], block.shape[place]
            read = self._read(values, Box(tuple(origin), tuple(shape)))
            self._put_bytes(as_bytes(read.permute(axes), values.dtype).numpy().data)

    def _aligned(self, width: int) -> bool:
        return self._filled % width == 0

    def _read(self, values: Values, box: Box, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._source.read(values.tensor, values.slot, box, out=out)

    def _read_straight(self, values: Values) -> None:
        """Read directly into the buffer that is written to the file."""
        width, shape = values.dtype.itemsize, values.box.shape
        done, total = 0, values.box.volume
        while done < total:
            count = min((len(self._bytes) - self._filled) // width, total - done)
            room = self._buffer[self._filled : self._filled + count * width].view(values.dtype)
            for box, at in flat_range_boxes(shape, done, done + count):
                target = room[at - done : at - done + box.volume].view(box.shape)
                self._read(values, box.moved_by(values.box.offset), target)
            self._advance(count * width)
            done += count

    def _put_zeros(self, count: int) -> None:
        while count:
            taken = min(count, len(self._bytes) - self._filled)
            self._buffer[self._filled : self._filled + taken].zero_()
            self._advance(taken)
            count -= taken

    def _put_bytes(self, data: memoryview) -> None:
        while data:
            taken = min(len(data), len(self._bytes) - self._filled)
            self._bytes[self._filled : self._filled + taken] = data[:taken]
            self._advance(taken)
            data = data[taken:]

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._bytes):
            self.flush()

    def _sum_record(self) -> None:
        if self._crc is not None:
            self._crc = crc32(self._bytes[self._summed : self._filled], self._crc)
        self._summed = self._filled

    def _end_record(self) -> None:
        self._sum_record()
        if self._crc is not None:
            self._crcs.append(self._crc)
            self._crc = None

    def flush(self) -> None:
        self._sum_record()
        if self._filled:
            data = self._bytes[: self._filled]
            self.checksums.append(checksum(data))
            with naming(self._path, "cannot be written"):
                write_past_cache(self._descriptor, data)
            self._moved(self._filled)
            self._filled = self._summed = 0
