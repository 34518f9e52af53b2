"""Atomic file replacement, and the files that ship with megagrow."""

from __future__ import annotations

import itertools
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_PACKAGE = Path(__file__).resolve().parent
# The directory of `configs/`: the package itself if setup.py put them there, else the checkout.
SHIPPED = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


def or_shipped(path: str | Path) -> Path:
    """A path, or if it does not exist, megagrow's own file of this name.

    So `configs/quickstart.yaml` names the same configuration from any working directory.
    """
    given = Path(path)
    if given.parts[:1] == ("configs",) and ".." not in given.parts and not os.path.lexists(given):
        own = SHIPPED / given
        return own if own.is_file() else given
    return given


def is_url(text: object) -> bool:
    """Whether a place is a URL, such as s3://bucket/run, and not a path of this machine."""
    return isinstance(text, str) and _URL.match(text) is not None


def sync_directory(path: Path) -> None:
    """Sync a directory to disk, so that its entries survive a power failure."""
    _sync(path, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Sync a file's content to disk."""
    _sync(path, 0)


def _sync(path: Path, flag: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name next to `path` that no other process uses, on this host or another."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def free_name(path: Path) -> Path:
    """The first of `NAME.1.SUFFIX`, `NAME.2.SUFFIX`, ... that is free."""
    numbers = itertools.count(1)
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in numbers)
    return next(name for name in names if not name.exists())


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write `content` to `path` atomically: the old file or the new one, never a partial one.

    Args:
        content: all of it, or its parts, which may be read from `path` itself.

    Raises:
        OSError: the write failed; `path` is unchanged.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as stream:
            stream.writelines([content] if isinstance(content, bytes) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
