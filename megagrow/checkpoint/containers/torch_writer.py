"""Plans files that `torch.load` reads: the counterpart of `torch_reader`.

The pickle is written instruction by instruction (protocol 2), so that classes of DeepSpeed or
Megatron can be named without importing either.  Records are uncompressed, their data aligned to
64 bytes as in torch's own writer; each record's checksum follows it in a data descriptor
(APPNOTE.TXT, section 4.3.9), so a file is written in one pass.  The headers are not `zipfile`'s,
which knows sizes and offsets only once all data went through it: here they are planned before any
is read, and a file may hold several archives at known places (`formats/dcp`).
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megagrow.checkpoint.containers.pickle_reader import STORAGES, Opaque
from megagrow.checkpoint.interface.format import (
    FilePlan,
    Late,
    Mark,
    Segment,
    Values,
    segment_bytes,
)

_ALIGNMENT = 64
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_NO_SIZE, _NO_COUNT = 0xFFFFFFFF, 0xFFFF
_FLAGS = 0x0808  # sizes and checksum follow the data; names are UTF-8
_DOS_TIME, _DOS_DATE = 0, 0x21  # midnight of 1 January 1980: equal state gives equal files


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor to be written; if the same object is used twice, its storage is shared.

    Attributes:
        segments: its values, row-major, as `Values` and `Zeros`, or as bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        size = sum(map(segment_bytes, self.segments))
        assert size == math.prod(self.shape) * self.dtype.itemsize, f"{size} bytes, {self.shape}"


def whole_values(values: Values, *, shape: Sequence[int] | None = None) -> NewTensor:
    """A tensor that is one box, in the box's shape or another."""
    return NewTensor(values.dtype, tuple(values.box.shape if shape is None else shape), (values,))


def number(value: float) -> NewTensor:
    """A scalar fp32 tensor."""
    return NewTensor(torch.float32, (), (struct.pack("<f", value),))


def size_of(shape: Sequence[int]) -> Opaque:
    """A `torch.Size`."""
    return Opaque("torch.Size", (tuple(shape),))


def plan_archive(name: str, value: Any) -> FilePlan:
    """Plan the file for a value: plain values, with `NewTensor` and `Opaque` in them.

    Args:
        name: path relative to the checkpoint's directory.
    """
    writer = _PickleWriter()
    text = writer.dump(value)
    root = name.rpartition("/")[2].removesuffix(".pt")
    records: list[tuple[str, Sequence[Segment]]] = [
        ("data.pkl", [text]),
        ("byteorder", [b"little"]),
        *((f"data/{i}", tensor.segments) for i, tensor in enumerate(writer.tensors)),
        ("version", [b"3\n"]),
    ]
    return FilePlan(name, list(_zip(root, records)))


@dataclass(frozen=True)
class _Entry:
    name: bytes
    start: int  # of the local header
    size: int

    @property
    def large(self) -> bool:
        return self.size >= _NO_SIZE


def _zip(root: str, records: Sequence[tuple[str, Sequence[Segment]]]) -> Iterator[Segment]:
    position = 0
    entries: list[_Entry] = []
    for name, segments in records:
        size = sum(map(segment_bytes, segments))
        entry = _Entry(f"{root}/{name}".encode(), position, size)
        head = _local_header(entry)
        yield head
        yield Mark()
        yield from segments
        index = len(entries)
        tail = 24 if entry.large else 16
        yield Late(tail, lambda crcs, i=index, e=entry: _descriptor(crcs[i], e))  # type: ignore[misc]
        position += len(head) + size + tail
        entries.append(entry)
    length = sum(len(_central_header(entry, 0)) for entry in entries)
    end = _end(len(entries), position, length)

    def directory(crcs: Sequence[int]) -> bytes:
        return b"".join(map(_central_header, entries, crcs)) + end

    yield Late(length + len(end), directory)


def _local_header(entry: _Entry) -> bytes:
    """A record's header, with an extra field that aligns the data to 64 bytes."""
    extra = struct.pack("<HHQQ", 1, 16, 0, 0) if entry.large else b""
    behind = entry.start + 30 + len(entry.name) + len(extra) + 4
    pad = -behind % _ALIGNMENT
    extra += struct.pack("<HH", 0x4246, pad) + b"Z" * pad  # torch's own name for the field
    size = _NO_SIZE if entry.large else 0
    return (
        struct.pack(
            "<4sHHHHHIIIHH",
            b"PK\3\4",
            45 if entry.large else 20,
            _FLAGS,
            0,
            _DOS_TIME,
            _DOS_DATE,
            0,
            size,
            size,
            len(entry.name),
            len(extra),
        )
        + entry.name
        + extra
    )


def _descriptor(crc: int, entry: _Entry) -> bytes:
    kind = "<4sIQQ" if entry.large else "<4sIII"
    return struct.pack(kind, b"PK\7\x08", crc, entry.size, entry.size)


def _central_header(entry: _Entry, crc: int) -> bytes:
    wide = [entry.size, entry.size] if entry.large else []
    far = entry.start >= _NO_SIZE
    wide += [entry.start] if far else []
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, start = (_NO_SIZE if entry.large else entry.size), (_NO_SIZE if far else entry.start)
    version = 45 if wide else 20
    return (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\1\2",
            version,
            version,
            _FLAGS,
            0,
            _DOS_TIME,
            _DOS_DATE,
            crc,
            size,
            size,
            len(entry.name),
            len(extra),
            0,
            0,
            0,
            0,
            start,
        )
        + entry.name
        + extra
    )


def _end(count: int, start: int, length: int) -> bytes:
    wide = b""
    if start >= _NO_SIZE or count >= _NO_COUNT:
        wide = struct.pack(
            "<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start
        ) + struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
    few = min(count, _NO_COUNT)
    return wide + struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, length, min(start, _NO_SIZE), 0
    )


class _PickleWriter:
    """Protocol 2, without memo: values are trees; only storages are shared."""

    def __init__(self) -> None:
        self.tensors: list[NewTensor] = []
        self._numbers: dict[int, int] = {}

    def dump(self, value: Any) -> bytes:
        return pickle.PROTO + b"\2" + b"".join(self._value(value)) + pickle.STOP

    def _value(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, NewTensor):
            yield from self._tensor(value)
        elif isinstance(value, Opaque):
            yield self._name(value.name)
            yield from self._value(value.args if value.args is not None else ())
            yield pickle.REDUCE if value.args is not None else pickle.NEWOBJ
            if value.state is not None:
                yield from self._value(value.state)
                yield pickle.BUILD
        elif isinstance(value, torch.dtype):
            yield self._name(str(value))
        elif isinstance(value, dict):
            yield pickle.EMPTY_DICT + pickle.MARK
            for key, item in value.items():
                yield from self._value(key)
                yield from self._value(item)
            yield pickle.SETITEMS
        elif isinstance(value, list):
            yield pickle.EMPTY_LIST + pickle.MARK
            for item in value:
                yield from self._value(item)
            yield pickle.APPENDS
        elif isinstance(value, tuple):
            yield pickle.MARK
            for item in value:
                yield from self._value(item)
            yield pickle.TUPLE
        elif value is None or isinstance(value, (bool, int, float, str)):
            # Python's own pickle of it, without the frame: PROTO with its argument, and STOP.
            yield pickle.dumps(value, protocol=2)[2:-1]
        else:
            raise TypeError(f"{type(value).__name__} is no plain value")

    def _tensor(self, tensor: NewTensor) -> Iterator[bytes]:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        yield self._name("torch._utils._rebuild_tensor_v2") + pickle.MARK
        yield pickle.MARK
        yield from self._value("storage")
        yield self._name(_STORAGE_NAMES[tensor.dtype])
        key = str(self._numbers[id(tensor)])
        yield from map(b"".join, map(self._value, (key, "cpu", math.prod(tensor.shape))))
        yield pickle.TUPLE + pickle.BINPERSID
        strides = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
        yield from map(b"".join, map(self._value, (0, tensor.shape, strides, False)))
        yield self._name("collections.OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        yield pickle.TUPLE + pickle.REDUCE

    @staticmethod
    def _name(full: str) -> bytes:
        module, _, name = full.rpartition(".")
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()
