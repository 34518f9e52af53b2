"""Reads the structure of `torch.save` archives, as whole files or as parts of larger files.

Such an archive is a zip file with uncompressed records: one pickle, and one record per tensor
storage.  torch.distributed.checkpoint concatenates archives in its files.  For writing them see
`torch_writer`.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.containers.pickle_reader import read_pickle
from megagrow.checkpoint.containers.stored_tensor import PickledRange
from megagrow.checkpoint.io.checksum import crc32
from megagrow.checkpoint.io.files import READING, RESTORE, naming, open_regular, read_exactly
from megagrow.errors import CheckpointError

_PICKLE_LIMIT = 1 << 28  # bytes; the pickle describes tensors but does not hold their values
_RECORD_LIMIT = 1 << 20  # number of records in one file


@dataclass(frozen=True)
class TorchFile:
    """The contents of a `torch.save` file.

    Attributes:
        path: the file.
        size: in bytes.
        value: the saved value: plain values, with `StoredTensor` and `Opaque` in them.
        records: (first byte, bytes, CRC-32) of each storage.
    """

    path: Path
    size: int
    value: Any
    records: tuple[tuple[int, int, int], ...]


def read_torch_file(
    path: Path, *, start: int = 0, length: int | None = None, permuted: bool = False
) -> TorchFile:
    """Read everything but the values of tensors.

    Args:
        start, length: the part of the file that is the archive; by default the whole file.
        permuted: whether tensors may have an order of axes other than row-major.

    Raises:
        CheckpointError: missing, damaged, not written by `torch.save`, or with anything but plain
            data in its pickle.
    """
    with open_regular(path) as (descriptor, size):
        window = _Window(descriptor, start, size - start if length is None else length)
        records = _list_records(path, window)
        if "byteorder" in records:
            order = _small(path, descriptor, records, "byteorder")
            if order != b"little":
                raise _fault(path, "values are not little-endian", order[:20])
        data = _small(path, descriptor, records, "data.pkl")
    value = read_pickle(data, where=path, storages=records, permuted=permuted)
    stored = tuple(
        (r.start, r.size, r.crc) for name, r in records.items() if name.startswith("data/")
    )
    return TorchFile(path, size, value, stored)


def _list_records(path: Path, window: _Window) -> dict[str, PickledRange]:
    """The records of the archive, by name relative to its root."""
    try:
        with zipfile.ZipFile(window) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a file of torch.save, or damaged",
            found=str(error),
            expected="a zip archive",
            fix=f"if a torch before 1.6 wrote it, save it again with a newer one; {RESTORE}",
        ) from None
    if not 0 < len(entries) <= _RECORD_LIMIT:
        raise _fault(path, "number of records", len(entries), f"1 to {_RECORD_LIMIT}")
    root = entries[0].filename.partition("/")[0]
    records: dict[str, PickledRange] = {}
    for entry in entries:
        top, _, name = entry.filename.partition("/")
        if top != root or not name or name in records:
            found = repr(entry.filename[:200])
            raise _fault(path, "a record's name", found, f"{root[:200]}/... , each once")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _fault(path, f"record {name[:200]} is compressed or encrypted")
        records[name] = _locate(path, window, entry)
    return records


def _locate(path: Path, window: _Window, entry: zipfile.ZipInfo) -> PickledRange:
    head = window.at(entry.header_offset, 30)
    if len(head) == 30:
        signature, name, extra = struct.unpack("<4s22xHH", head)
        first = entry.header_offset + 30 + name + extra
        whole = entry.compress_size == entry.file_size and first + entry.file_size <= window.length
        if signature == b"PK\3\4" and whole:
            return PickledRange(window.start + first, entry.file_size, entry.CRC)
    raise _fault(path, f"record {entry.filename[:200]} is damaged or cut short")


def _small(path: Path, descriptor: int, records: Mapping[str, PickledRange], name: str) -> bytes:
    entry = records.get(name)
    if entry is None or entry.size > _PICKLE_LIMIT:
        found = "no such record" if entry is None else f"{entry.size} bytes"
        raise _fault(path, f"record {name}", found, f"at most {_PICKLE_LIMIT} bytes")
    data = bytearray(entry.size)
    _read(path, descriptor, entry.start, memoryview(data))
    if crc32(data) != entry.crc:
        raise _fault(path, f"record {name} is damaged: its checksum differs")
    return bytes(data)


def _read(path: Path, descriptor: int, start: int, data: memoryview) -> None:
    with naming(path, "cannot be read", READING):
        if not read_exactly(descriptor, data, start):
            raise _fault(path, "truncated", expected=f"{start + len(data)} bytes or more")


def _fault(path: Path, what: str, found: object = None, expected: object = None) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", found=found, expected=expected, fix=RESTORE)


class _Window(io.RawIOBase):
    """A range of a file as a file object."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self.start, self.length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self.length)[whence]
        if base + offset < 0:
            raise OSError("before the first byte")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._descriptor, count, self.start + self._at)
        self._at += len(data)
        return data

    def at(self, position: int, count: int) -> bytes:
        """Up to `count` bytes from a position on."""
        if position < 0:
            return b""
        self.seek(position)
        return self.read(count)
