"""Pickles read as data: names and calls are kept as what they are and never carried out.

A pickle is a program for a small machine.  This one has Python's instructions for plain values;
those that import a name, call it or set attributes make an `Inert` record instead, and only
names that the caller lists may appear at all.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

_STEPS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL "
    "BINPERSID"
)


@dataclass(frozen=True)
class Name:
    """A name that a pickle mentions, dotted."""

    name: str


@dataclass(eq=False)
class Inert:
    """What a pickle would have called: a name with arguments, and the attributes it would set."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


def read_inert(data: bytes, names: Collection[str], *, persistent: bool = False) -> Any:
    """What a pickle describes.

    Args:
        names: dotted names that may appear.
        persistent: whether it may refer to objects outside; such a reference is kept as it is.

    Raises:
        ValueError: damaged, or with a name or an instruction that is none of these.
    """
    try:
        return _Machine(data, names, persistent).load()
    except ValueError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"pickle is refused, and nothing of it was run: {error}") from None
    except (MemoryError, RecursionError, Exception) as error:
        raise ValueError(f"pickle is damaged: {type(error).__name__}: {error}"[:300]) from None


def brief(value: Any) -> str:
    """What a value is, in a few words; a deep one, or one that holds itself, does no harm."""
    return reprlib.repr(value)[:200]


_PYTHONS: Any = pickle._Unpickler


class _Machine(_PYTHONS):
    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: _PYTHONS.dispatch[code]
        for code in (getattr(pickle, step)[0] for step in _STEPS.split())
    }

    def __init__(self, data: bytes, names: Collection[str], persistent: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._names, self._persistent = names, persistent

    def find_class(self, module: str, name: str) -> Name:
        full = f"{module}.{name}"
        if full not in self._names:
            raise pickle.UnpicklingError(f"it names {full[:200]!r}")
        return Name(full)

    def persistent_load(self, pid: Any) -> Any:
        if not self._persistent:
            raise pickle.UnpicklingError("it refers to an object outside")
        return pid

    def _call(self) -> None:
        args = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Name) or not isinstance(args, tuple):
            raise pickle.UnpicklingError(f"it calls {brief(target)}")
        self.stack[-1] = Inert(target.name, args)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Inert) or target.state is not None:
            raise pickle.UnpicklingError(f"it sets attributes of {brief(target)}")
        target.state = state

    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _call
    dispatch[pickle.BUILD[0]] = _build
