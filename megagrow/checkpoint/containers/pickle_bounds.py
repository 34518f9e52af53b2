"""Bounds on the work that a value from a pickle may cause: counted in parts, never timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_KEY_PARTS = 16
_DEEPEST = 100


class RefusedError(Exception):
    """Why a pickle is refused."""


def require_small(key: Any) -> None:
    """Refuse a key that is expensive to hash: tuples are hashed part by part."""
    waiting, parts = [key], 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if isinstance(part, tuple):
            if parts + len(waiting) + len(part) > _KEY_PARTS:
                raise RefusedError(f"a key of more than {_KEY_PARTS} parts")
            waiting += part


HASHING: Mapping[str, Callable[[list[Any]], Sequence[Any]]] = {
    "SETITEM": lambda stack: stack[-2:-1],
    "SETITEMS": lambda stack: stack[::2],
    "DICT": lambda stack: stack[::2],
    "ADDITEMS": lambda stack: stack,
}


def require_tree(
    value: Any, *, most: int, parts_of: Callable[[Any], Sequence[Any]], kinds: tuple[type, ...]
) -> None:
    """Refuse a value that contains itself, is deep, or has more than `most` parts as a tree.

    Code that prints, compares or converts a value walks it as a tree.

    Args:
        parts_of: returns the parts of a value.
        kinds: types of values that have parts.

    Raises:
        RefusedError: the value is refused.
    """
    known: dict[int, tuple[int, int]] = {}  # by identity: number of parts and depth of the tree
    around: set[int] = set()
    waiting = [(value, False)]
    while waiting:
        item, seen = waiting.pop()
        this = id(item)
        if seen:
            below = [known.get(id(part), (1, 1)) for part in parts_of(item)]
            parts, depth = 1 + sum(n for n, _ in below), 1 + max((d for _, d in below), default=0)
            if parts > most:
                raise RefusedError(f"references that expand to more than {most:,} values")
            if depth > _DEEPEST:
                raise RefusedError(f"values nested deeper than {_DEEPEST} levels")
            known[this] = parts, depth
            around.discard(this)
        elif this in around:
            raise RefusedError("a value that holds itself")
        elif this not in known and (parts_here := parts_of(item)):
            around.add(this)
            waiting.append((item, True))
            waiting += ((part, False) for part in parts_here if isinstance(part, kinds))
