"""A tensor as torch.save writes it, found inside a larger file.

torch.distributed.checkpoint lays such archives end to end in its files.  An archive is a zip
with its records stored as they are; `data.pkl` describes the tensor and `data/0` has its values.
For writing them see `archive`, for files that are one archive `pickles`.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from megagrow.checkpoint.inert import Inert, Name, read_inert
from megagrow.checkpoint.pickles import STORAGES

_PICKLE_LIMIT = 1 << 20
_NAMES = frozenset(
    {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict", *STORAGES}
)  # what data.pkl of a plain tensor mentions


@dataclass(frozen=True)
class Archived:
    """Where a tensor of an archive lies; `start` counts from the archive's first byte.

    `axes` is the order of its axes in memory, or None for row-major.
    """

    start: int
    bytes: int
    crc32: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None


def find_tensor(descriptor: int, start: int, length: int) -> Archived:
    """The one tensor of the archive in bytes [start, start + length) of a file.

    Raises:
        ValueError: damaged, or anything else than one dense tensor.
    """
    window = _Window(descriptor, start, length)
    try:
        with zipfile.ZipFile(window) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if entries["data.pkl"].file_size > _PICKLE_LIMIT or entries["data.pkl"].compress_type:
                raise ValueError("data.pkl is too long or compressed")
            text = archive.read(entries["data.pkl"])
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError("values are not little-endian")
    except (zipfile.BadZipFile, NotImplementedError, KeyError, EOFError, RuntimeError) as error:
        raise ValueError(f"not an archive of torch.save, or damaged: {error}") from None
    except (struct.error, OSError, zlib.error) as error:
        raise ValueError(f"archive is damaged: {error}") from None
    tensor = read_inert(text, _NAMES, persistent=True)
    key, dtype, count, shape, strides = _described(tensor)
    entry = entries.get(f"data/{key}")
    if entry is None or entry.compress_type or entry.flag_bits & 1:
        raise ValueError(f"record data/{key} is missing, compressed or encrypted")
    if entry.file_size != count * dtype.itemsize or math.prod(shape) != count:
        raise ValueError(f"{entry.file_size} bytes for {count} values of shape {list(shape)}")
    axes = _axes(shape, strides)
    head = window.at(entry.header_offset, 30)
    signature, name, extra = struct.unpack("<4s22xHH", head)
    first = entry.header_offset + 30 + name + extra
    if signature != b"PK\3\4" or first + entry.file_size > length:
        raise ValueError("the header of its values is damaged")
    return Archived(first, entry.file_size, entry.CRC, dtype, shape, axes)


def _described(tensor: Any) -> tuple[str, torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    """Storage key, element type, number of elements, shape and strides told by data.pkl."""
    whole = isinstance(tensor, Inert) and tensor.name == "torch._utils._rebuild_tensor_v2"
    args: tuple[Any, ...] = tensor.args if whole else ()
    if len(args) < 4:
        raise ValueError("data.pkl holds something else than a tensor")
    storage, offset, shape, strides = args[:4]
    if not (isinstance(storage, tuple) and len(storage) == 5 and storage[0] == "storage"):
        raise ValueError("data.pkl holds a tensor without a storage")
    _, kind, key, _, count = storage
    dtype = STORAGES.get(kind.name) if isinstance(kind, Name) else None
    lists = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if dtype is None or not lists or offset != 0 or not str(key).isdigit() or len(str(key)) > 9:
        raise ValueError("data.pkl holds a tensor of an unknown kind")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (count, *shape, *strides)):
        raise ValueError("data.pkl holds a tensor with a shape that cannot be")
    return str(key), dtype, count, shape, strides


def _axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The permutation in whose row-major order a dense tensor lies; None for the axes' own."""
    # The stride of an axis of length 1 tells nothing.
    long = [axis for axis, n in enumerate(shape) if n != 1]
    turned = sorted(long, key=lambda axis: -strides[axis])
    step = 1
    for axis in reversed(turned):
        if strides[axis] != step:
            raise ValueError(f"strides {list(strides)} of shape {list(shape)} leave holes")
        step *= shape[axis]
    short = [axis for axis, n in enumerate(shape) if n == 1]
    return None if turned == long else (*short, *turned)


class _Window(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self._length)[whence]
        if base + offset < 0:
            raise OSError("before the first byte")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._descriptor, count, self._start + self._at)
        self._at += len(data)
        return data

    def at(self, position: int, count: int) -> bytes:
        """Bytes from a position on (ValueError where there are fewer)."""
        self.seek(position)
        data = self.read(count)
        if len(data) != count:
            raise ValueError("archive is cut short")
        return data
