"""Headers of safetensors files; values are read and written elsewhere.

A file is the length of its header (8 bytes, little-endian), the header (JSON: for each name the
element type, shape, first and last byte of its values) and the values, row-major without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.io.dtypes import DTYPE_NAMES, DTYPES
from megagrow.checkpoint.io.files import (
    READING,
    RESTORE,
    naming,
    open_regular,
    read_exactly,
)
from megagrow.checkpoint.io.strict_json import parse_json
from megagrow.errors import CheckpointError

_HEADER_LIMIT = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class StoredArray:
    """An array in a file; `start` is the offset of its first byte."""

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path, file: str) -> tuple[dict[str, StoredArray], int]:
    """The arrays of `path / file` by name, and the file's size in bytes.

    Raises:
        CheckpointError: not a safetensors file, damaged or hostile.
    """
    where = path / file
    with open_regular(where) as (descriptor, size), naming(where, "cannot be read", READING):
        length = _exactly(where, descriptor, 0, 8) if size >= 8 else b""
        count = int.from_bytes(length, "little")
        if not 2 <= count <= min(_HEADER_LIMIT, size - 8):
            raise _fault(where, "header", f"{count} bytes in a file of {size}")
        text = _exactly(where, descriptor, 8, count)
    header = parse_json(text, where=str(where))
    header.pop("__metadata__", None)
    arrays = {name: _array(where, file, name, entry, 8 + count) for name, entry in header.items()}
    position = 8 + count
    for name, array in sorted(arrays.items(), key=lambda item: (item[1].start, item[1].shape)):
        if array.start != position:
            raise _fault(where, f"tensor {name} overlaps another or leaves a hole", array.start)
        position += math.prod(array.shape) * array.dtype.itemsize
    if position != size:
        raise _fault(where, "size does not agree with its header", f"{size} bytes", position)
    return arrays, size


def make_header(arrays: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """The length field and header of a file with these arrays, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in arrays:
        stop = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _array(where: Path, file: str, name: str, entry: Any, first: int) -> StoredArray:
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _fault(where, f"tensor {name[:200]}: its entry is damaged")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        kinds = ", ".join(DTYPES)
        raise _fault(where, f"tensor {name[:200]}: element type", repr(entry["dtype"])[:40], kinds)
    dtype = DTYPES[entry["dtype"]]
    if not _counts(shape) or len(shape) > 16 or not _counts(offsets) or len(offsets) != 2:
        raise _fault(where, f"tensor {name[:200]}: shape and offsets", f"{shape}, {offsets}"[:200])
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise _fault(
            where,
            f"tensor {name[:200]}: its size is not its shape's",
            f"{offsets[1] - offsets[0]} bytes",
            f"{math.prod(shape) * dtype.itemsize} bytes for {shape} of {dtype}"[:200],
        )
    return StoredArray(file, first + offsets[0], dtype, tuple(shape))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _exactly(path: Path, descriptor: int, start: int, count: int) -> bytes:
    data = bytearray(count)
    if not read_exactly(descriptor, memoryview(data), start):
        raise _fault(path, "changed while it is read")
    return bytes(data)


def _fault(path: Path, what: str, found: object = None, expected: object = None) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", found=found, expected=expected, fix=RESTORE)
