"""Reads pickles as data: no name in them is imported, called or given attributes.

A pickle is a program for a small stack machine.  This reader implements only the instructions
that build plain values, and never imports a name: a few names stand for tensors and containers,
some are kept as `Opaque` values, and any other is refused by name.  For tensors it returns only
the position of the values in the file: see `torch_reader`.

A few bytes of a pickle can describe a value too large to print, compare or hash: a
tuple of two references to a tuple of two references, and so on.  So work is counted, never
timed: instructions, parts of keys, and the size that the value would have if every shared
reference were a copy.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from megagrow.checkpoint.containers.pickle_bounds import (
    HASHING,
    RefusedError,
    require_small,
    require_tree,
)
from megagrow.checkpoint.containers.stored_tensor import PickledRange, StoredTensor
from megagrow.checkpoint.io.files import RESTORE
from megagrow.errors import CheckpointError

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
# Kept as a name with arguments; never imported or called.
_OPAQUE_NAMES = frozenset(
    {
        "argparse.Namespace",
        "_codecs.encode",
        "types.SimpleNamespace",
        "signal.Signals",
        "_io.BytesIO",
    }
)
MOST_INSTRUCTIONS = 1 << 24  # a tensor takes about 50
_MOST_COPIES, _SOME_PARTS = 4, 10_000  # tree parts per instruction; tree parts always allowed
_MOST_AXES = 64
_LONGEST_NAME = 512
_OPAQUE_ROOMS = ("deepspeed.", "megatron.", "numpy.", "torch.optim.", "pathlib.")


@dataclass(frozen=True)
class Opaque:
    """An object of a class that the reader knows only by name.

    Attributes:
        name: dotted name of the class or function.
        args: its call arguments; None if it is created without a call.
        state: its attributes, if the pickle sets any.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None

    # Some pickles use it as a dictionary key, although its state may be a dictionary.
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self.name}>"  # its contents may be a whole checkpoint

    def attribute(self, name: str, default: Any = None) -> Any:
        """One of its attributes."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


def read_pickle(
    data: bytes,
    *,
    where: Path,
    storages: Mapping[str, PickledRange] | None = None,
    names: Collection[str] | None = None,
    permuted: bool = False,
    instructions: int = MOST_INSTRUCTIONS,
) -> Any:
    """The value that a pickle describes: plain values, with `StoredTensor` and `Opaque` in them.

    Args:
        where: the file, for errors and for tensors.
        storages: storages of tensors, by record name.
        names: the only names allowed; by default those used by checkpoints.
        permuted: whether tensors may have an order of axes other than row-major.
        instructions: maximum number of instructions executed.

    Raises:
        CheckpointError: it is damaged, contains anything but plain data, or demands more work
            than its length warrants.
    """
    return _Machine(where, storages or {}, data, names, permuted, instructions).run()


def brief(value: Any) -> str:
    """A short description of a value; safe for deep values and values that contain themselves."""
    return reprlib.repr(value)[:200]


# --- the pickle machine -------------------------------------------------------------------


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
_Step = Callable[[Any], None]


def _counted(step: _Step) -> _Step:
    """An instruction that counts itself against the budget."""

    def counted(machine: _Machine) -> None:
        machine.spent += 1  # inlined instead of `charge`, since it runs for every instruction
        if machine.spent > machine.limit:
            machine.charge(0)
        step(machine)

    return counted


def _with_keys(step: _Step, keys: Callable[[list[Any]], Sequence[Any]]) -> _Step:
    """An instruction that hashes; `keys` returns the keys to check from its stack."""

    def checked(machine: _Machine) -> None:
        for key in keys(machine.stack):
            require_small(key)
        step(machine)

    return checked


def _instruction(name: str) -> _Step:
    step: _Step = _PYTHONS.dispatch[getattr(pickle, name)[0]]
    return _counted(_with_keys(step, HASHING[name]) if name in HASHING else step)


class _Machine(_PYTHONS):
    """Python's unpickler, with instructions that could run code replaced or removed."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, _Step]] = {
        getattr(pickle, name)[0]: _instruction(name) for name in _INSTRUCTIONS.split()
    }

    def __init__(
        self,
        path: Path,
        records: Mapping[str, PickledRange],
        data: bytes,
        names: Collection[str] | None,
        permuted: bool,
        instructions: int,
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path, self._records, self._names, self._permuted = path, records, names, permuted
        self.spent, self.limit = 0, instructions

    def charge(self, count: int) -> None:
        """Charge work as this many instructions."""
        self.spent += count
        if self.spent > self.limit:
            raise RefusedError(f"more than {self.limit:,} instructions")

    def run(self) -> Any:
        """The value (raises CheckpointError)."""
        try:
            value = self.load()
            require_tree(
                value,
                most=_MOST_COPIES * self.spent + _SOME_PARTS,
                parts_of=_parts,
                kinds=_CONTAINERS,
            )
            return value
        except RefusedError as reason:
            raise CheckpointError(
                f"{self._path}: its pickle is refused, and none of its code was run",
                found=str(reason)[:500],
                expected="tensors and plain values",
                fix="if you trust the file, load it where it was made and save plain tensors",
            ) from None
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:500]
            raise CheckpointError(
                f"{self._path}: its pickle is damaged", found=found, fix=RESTORE
            ) from None

    def find_class(self, module: str, name: str) -> Any:
        """Return a name as a name; refuse it if checkpoints do not use it."""
        if len(module) + len(name) > _LONGEST_NAME:
            raise RefusedError(f"a name of {len(module) + len(name)} characters")
        full = f"{module}.{name}"
        kind = full.removeprefix("torch.")
        dtype = getattr(torch, kind, None) if kind.isidentifier() and kind != full else None
        if isinstance(dtype, torch.dtype):
            return Opaque(full)
        known = full in _CALLS or full in STORAGES or full in _OPAQUE_NAMES
        if self._names is not None:
            known = full in self._names
        elif full.isprintable() and full.startswith(_OPAQUE_ROOMS):
            known = True
        if known:
            return _Global(full)
        raise RefusedError(f"it names {full!r}")

    def persistent_load(self, pid: Any) -> Any:
        """A tensor storage: (record, element type)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise RefusedError(f"it refers to {brief(pid)}")
        _, kind, key, _, numel = pid
        dtype = STORAGES.get(kind.name) if isinstance(kind, _Global) else None
        if dtype is None or not isinstance(numel, int) or not isinstance(key, str):
            raise RefusedError(f"a storage of {brief(kind)}")
        if len(key) > _LONGEST_NAME:
            raise RefusedError(f"a storage with a name of {len(key)} characters")
        record = self._records.get(f"data/{key}")
        if record is None or record.size != numel * dtype.itemsize:
            raise RefusedError(f"storage {brief(key)} has not {numel} elements of {dtype}")
        return _Storage(self._path, record.start, dtype, numel)

    def _reduce(self) -> None:
        args = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Global) or not isinstance(args, tuple):
            raise RefusedError(f"it calls {brief(target)}")
        # A call inspects each part of its arguments.
        self.charge(sum(len(one) for one in args if isinstance(one, (tuple, list))))
        call = _CALLS.get(target.name)
        value = call(args) if call else Opaque(target.name, args)
        if isinstance(value, StoredTensor) and value.axes is not None and not self._permuted:
            raise RefusedError(f"a tensor of shape {list(value.shape)} that is not row-major")
        self.stack[-1] = value

    def _new_object(self) -> None:
        args = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Global) or target.name in _CALLS or args != ():
            raise RefusedError(f"it makes an object of {brief(target)}")
        self.stack[-1] = Opaque(target.name)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Opaque) and target.state is None:
            # In place: later references in the pickle must see the object with its state.
            object.__setattr__(target, "state", state)
        elif not isinstance(target, dict):  # attributes of a state_dict: module versions
            raise RefusedError(f"it sets attributes of {type(target).__name__}")

    dispatch[pickle.REDUCE[0]] = _counted(_reduce)
    dispatch[pickle.NEWOBJ[0]] = _counted(_new_object)
    dispatch[pickle.BUILD[0]] = _counted(_build)


_CONTAINERS = (dict, list, tuple, set, Opaque)


def _parts(value: Any) -> Sequence[Any]:
    """The parts of a value; empty if it is not a container."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set)):
        return list(value)
    return (value.args, value.state) if isinstance(value, Opaque) else ()


@dataclass(frozen=True)
class _Storage:
    path: Path
    start: int
    dtype: torch.dtype
    numel: int


def _tensor(args: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, strides = args[:4]
    if len(shape) > _MOST_AXES or len(strides) > _MOST_AXES:
        raise RefusedError(f"a tensor with {len(shape)} axes")
    numbers = (offset, *shape, *strides)
    good = isinstance(storage, _Storage) and len(shape) == len(strides)
    if not good or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise RefusedError(f"a tensor of {brief(numbers)}")
    axes = _axes(tuple(shape), tuple(strides)) if 0 not in shape else None
    if offset + math.prod(shape) > storage.numel:
        raise RefusedError(f"a tensor of shape {list(shape)} reaches outside its storage")
    start = storage.start + offset * storage.dtype.itemsize
    return StoredTensor(storage.path, start, storage.dtype, tuple(shape), axes)


def _axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axis order in which a dense tensor is row-major; None if it already is."""
    # The stride of an axis of length 1 is arbitrary.
    long = [axis for axis, n in enumerate(shape) if n != 1]
    turned = sorted(long, key=lambda axis: -strides[axis])
    step = 1
    for axis in reversed(turned):
        if strides[axis] != step:
            raise RefusedError(f"strides {list(strides)} of shape {list(shape)} leave holes")
        step *= shape[axis]
    short = [axis for axis, n in enumerate(shape) if n == 1]
    return None if turned == long else (*short, *turned)


def _parameter(args: tuple[Any, ...]) -> StoredTensor:
    if not args or not isinstance(args[0], StoredTensor):
        raise RefusedError("a parameter that is no tensor")
    return args[0]


def _typed(args: tuple[Any, ...]) -> StoredTensor:
    function, kind, inner = args[0], args[1], args[2]
    if function != _Global("torch._utils._rebuild_tensor_v2") or kind != _Global("torch.Tensor"):
        raise RefusedError(f"a tensor made by {brief(function)}")
    return _tensor(inner)


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = [(key, value) for key, value in (args[0] if args else ())]
    for key, _ in pairs:
        require_small(key)
    return dict(pairs)


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    if len(args[0]) > _MOST_AXES:
        raise RefusedError(f"a shape with {len(args[0])} axes")
    return tuple(int(n) for n in args[0])


def _not_called(args: tuple[Any, ...]) -> Any:
    raise RefusedError("it calls torch.Tensor")


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Tensor": _not_called,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
}
