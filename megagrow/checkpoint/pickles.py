"""Files of `torch.save`, read without running what they say, and written as a stream.

Such a file is a zip archive with its records stored as they are: one pickle, and one record
for each tensor storage.  A pickle is a program.  The reader here knows only the instructions
that build plain values; a name in the pickle is never imported: a few names stand for tensors
and containers, some more are kept as `Opaque` values, and any other is refused by name.
Of a tensor's values only the place in the file is told: whoever wants them makes range reads.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from megagrow.checkpoint.crc import crc32
from megagrow.checkpoint.directory import READING, RESTORE, naming, open_regular, read_exactly
from megagrow.errors import CheckpointError

_PICKLE_LIMIT = 1 << 28  # bytes; a pickle describes tensors, it does not hold them
_RECORD_LIMIT = 1 << 20  # number of records in one file

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# Kept as a name with arguments; none of them is imported or called.
_OPAQUE_NAMES = frozenset(
    {
        "argparse.Namespace",
        "_codecs.encode",
        "types.SimpleNamespace",
        "signal.Signals",
        "_io.BytesIO",
    }
)
_OPAQUE_ROOMS = ("deepspeed.", "megatron.", "numpy.", "torch.optim.", "pathlib.")


@dataclass(frozen=True)
class Opaque:
    """An object of a class that the reader knows by name alone.

    Attributes:
        name: dotted name of the class or function.
        args: what it is called with; None if it is made bare.
        state: its attributes, where the pickle sets any.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None

    def attribute(self, name: str, default: Any = None) -> Any:
        """One of its attributes."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file, row-major from its first byte on.

    Attributes:
        start: its first byte in the file.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def item(self) -> float:
        """The value of a tensor of one element (raises CheckpointError, ValueError)."""
        if self.numel != 1:
            raise ValueError(f"{self.path}: a tensor of shape {list(self.shape)} is no number")
        data = bytearray(self.dtype.itemsize)
        with open_regular(self.path) as (descriptor, _):
            _read(self.path, descriptor, self.start, memoryview(data))
        return float(torch.frombuffer(data, dtype=self.dtype).item())


@dataclass(frozen=True)
class TorchFile:
    """What a file of `torch.save` holds.

    Attributes:
        path: the file.
        size: in bytes.
        value: what was saved: plain values, with `StoredTensor` and `Opaque` among them.
        records: of each storage (first byte, bytes, CRC-32).
    """

    path: Path
    size: int
    value: Any
    records: tuple[tuple[int, int, int], ...]


def read_torch_file(path: Path) -> TorchFile:
    """Read all but the values of tensors.

    Raises:
        CheckpointError: missing, damaged, not of `torch.save`, or with anything in its pickle
            that is not plain data.
    """
    with open_regular(path) as (descriptor, size):
        records = _list_records(path, descriptor, size)
        if "byteorder" in records:
            order = _small(path, descriptor, records, "byteorder")
            if order != b"little":
                raise _fault(path, "values are not little-endian", order[:20])
        data = _small(path, descriptor, records, "data.pkl")
    value = _Machine(path, records, data).run()
    stored = tuple(
        (r.start, r.size, r.crc) for name, r in records.items() if name.startswith("data/")
    )
    return TorchFile(path, size, value, stored)


@dataclass(frozen=True)
class _Record:
    start: int
    size: int
    crc: int


def _list_records(path: Path, descriptor: int, size: int) -> dict[str, _Record]:
    """The records of the archive by their names below its root."""
    try:
        with open(os.dup(descriptor), "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a file of torch.save, or damaged",
            found=str(error),
            expected="a zip archive",
            mend=f"if a torch before 1.6 wrote it, save it again with a newer one; {RESTORE}",
        ) from None
    if not 0 < len(entries) <= _RECORD_LIMIT:
        raise _fault(path, "number of records", len(entries), f"1 to {_RECORD_LIMIT}")
    root = entries[0].filename.partition("/")[0]
    records: dict[str, _Record] = {}
    for entry in entries:
        top, _, name = entry.filename.partition("/")
        if top != root or not name or name in records:
            found = repr(entry.filename[:200])
            raise _fault(path, "a record's name", found, f"{root[:200]}/... , each once")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _fault(path, f"record {name[:200]} is compressed or encrypted")
        records[name] = _locate(path, descriptor, size, entry)
    return records


def _locate(path: Path, descriptor: int, size: int, entry: zipfile.ZipInfo) -> _Record:
    head = bytearray(30)
    _read(path, descriptor, entry.header_offset, memoryview(head))
    signature, name, extra = struct.unpack("<4s22xHH", head)
    start = entry.header_offset + 30 + name + extra
    whole = entry.compress_size == entry.file_size and start + entry.file_size <= size
    if signature != b"PK\3\4" or not whole:
        raise _fault(path, f"record {entry.filename[:200]} is damaged or cut short")
    return _Record(start, entry.file_size, entry.CRC)


def _small(path: Path, descriptor: int, records: Mapping[str, _Record], name: str) -> bytes:
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
    return CheckpointError(f"{path}: {what}", found=found, expected=expected, mend=RESTORE)


# --- the pickle machine -------------------------------------------------------------------


class _RefusedError(Exception):
    """Why a pickle is not taken."""


@dataclass(frozen=True)
class _Global:
    """A name that a pickle mentions."""

    name: str


_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 INT LONG BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINSTRING SHORT_BINSTRING "
    "EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT LIST "
    "SETITEM SETITEMS EMPTY_SET ADDITEMS POP POP_MARK DUP "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
)


_PYTHONS: Any = pickle._Unpickler


class _Machine(_PYTHONS):
    """Python's unpickler with the instructions that could run something replaced or left out."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: _PYTHONS.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _INSTRUCTIONS.split())
    }

    def __init__(self, path: Path, records: Mapping[str, _Record], data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path, self._records = path, records

    def run(self) -> Any:
        """The value (raises CheckpointError)."""
        try:
            return self.load()
        except _RefusedError as reason:
            raise CheckpointError(
                f"{self._path}: its pickle is refused; nothing of it was run",
                found=str(reason)[:500],
                expected="tensors and plain values",
                mend="if you trust the file, load it where it was made and save plain tensors",
            ) from None
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:500]
            raise _fault(self._path, "its pickle is damaged", found) from None

    def find_class(self, module: str, name: str) -> Any:
        """A name as a name; refused where it is not one that a checkpoint has."""
        full = f"{module}.{name}"
        kind = full.removeprefix("torch.")
        dtype = getattr(torch, kind, None) if kind.isidentifier() and kind != full else None
        if isinstance(dtype, torch.dtype):
            return Opaque(full)
        known = full in _CALLS or full in STORAGES or full in _OPAQUE_NAMES
        if full.isprintable() and (known or full.startswith(_OPAQUE_ROOMS)):
            return _Global(full)
        raise _RefusedError(f"it names {full!r}")

    def persistent_load(self, pid: Any) -> Any:
        """A tensor storage: (record, element type)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise _RefusedError(f"it refers to {pid!r:.100}")
        _, kind, key, _, numel = pid
        dtype = STORAGES.get(kind.name) if isinstance(kind, _Global) else None
        if dtype is None or not isinstance(numel, int):
            raise _RefusedError(f"a storage of {kind!r:.100}")
        record = self._records.get(f"data/{key}")
        if record is None or record.size != numel * dtype.itemsize:
            raise _RefusedError(f"storage {key!r:.40} has not {numel} elements of {dtype}")
        return _Storage(self._path, record.start, dtype, numel)

    def _reduce(self) -> None:
        args = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Global) or not isinstance(args, tuple):
            raise _RefusedError(f"it calls {target!r:.100}")
        call = _CALLS.get(target.name)
        self.stack[-1] = call(args) if call else Opaque(target.name, args)

    def _new_object(self) -> None:
        args = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Global) or target.name in _CALLS or args != ():
            raise _RefusedError(f"it makes an object of {target!r:.100}")
        self.stack[-1] = Opaque(target.name)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Opaque) and target.state is None:
            # In place: what the pickle refers to again must be the object with its state.
            object.__setattr__(target, "state", state)
        elif not isinstance(target, dict):  # attributes of a state_dict: versions of modules
            raise _RefusedError(f"it sets attributes of {type(target).__name__}")

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _new_object
    dispatch[pickle.BUILD[0]] = _build


@dataclass(frozen=True)
class _Storage:
    path: Path
    start: int
    dtype: torch.dtype
    numel: int


def _tensor(args: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, strides = args[:4]
    numbers = (offset, *shape, *strides)
    good = isinstance(storage, _Storage) and len(shape) == len(strides) <= 64
    if not good or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise _RefusedError(f"a tensor of {numbers!r:.100}")
    if any(stride != step for stride, step in _strides(shape, strides)):
        raise _RefusedError(f"a tensor of shape {list(shape)} that is not row-major")
    if offset + math.prod(shape) > storage.numel:
        raise _RefusedError(f"a tensor of shape {list(shape)} reaches outside its storage")
    start = storage.start + offset * storage.dtype.itemsize
    return StoredTensor(storage.path, start, storage.dtype, tuple(shape))


def _strides(shape: Sequence[int], strides: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each stride that matters, with what it is in a row-major tensor."""
    for axis, (length, stride) in enumerate(zip(shape, strides, strict=True)):
        if length > 1 and 0 not in shape:
            yield stride, math.prod(shape[axis + 1 :])


def _parameter(args: tuple[Any, ...]) -> StoredTensor:
    if not args or not isinstance(args[0], StoredTensor):
        raise _RefusedError("a parameter that is no tensor")
    return args[0]


def _typed(args: tuple[Any, ...]) -> StoredTensor:
    function, kind, inner = args[0], args[1], args[2]
    if function != _Global("torch._utils._rebuild_tensor_v2") or kind != _Global("torch.Tensor"):
        raise _RefusedError(f"a tensor made by {function!r:.100}")
    return _tensor(inner)


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    return dict(*args)


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(int(n) for n in args[0])


def _not_called(args: tuple[Any, ...]) -> Any:
    raise _RefusedError("it calls torch.Tensor")


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Tensor": _not_called,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
}
