"""The steps under a root directory: committed, in progress and set aside."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from megagrow.checkpoint.io.files import READING, naming
from megagrow.checkpoint.native.manifest import NAME
from megagrow.errors import CheckpointError
from megagrow.files import sync_directory

_TEMPORARY = ".tmp-"

_ASIDE = ".set-aside-"

_QUIET_SECONDS = 3600.0


def step_path(root: Path, step: int) -> Path:
    """The path of a step's committed checkpoint, whether or not it exists."""
    return root / f"step_{step:08d}"


def temporary_path(root: Path, step: int, nonce: str) -> Path:
    """The path where a save of a step works until it commits."""
    return root / f"step_{step:08d}{_TEMPORARY}{nonce}"


def is_temporary(path: Path) -> bool:
    """Whether the name is that of an uncommitted save or a deletion in progress."""
    return path.name.startswith("step_") and _TEMPORARY in path.name


def step_of(path: Path) -> int | None:
    """The step in a committed checkpoint's name, or None for any other name."""
    digits = path.name.removeprefix("step_")
    if not (digits.isascii() and digits.isdigit()):
        return None
    step = int(digits)
    return step if path.name == step_path(path.parent, step).name else None


def list_steps(root: Path) -> list[int]:
    """Steps of all committed checkpoints in a directory, ascending; including damaged ones."""
    return sorted(
        step for path in _children(root) if path.is_dir() and (step := step_of(path)) is not None
    )


def newest(root: Path) -> Path | None:
    """The committed checkpoint of the highest step, or None; it is not opened."""
    steps = list_steps(root)
    return step_path(root, steps[-1]) if steps else None


def _children(root: Path) -> list[Path]:
    if not root.exists():
        return []
    with naming(root, "cannot be read", READING):
        return sorted(root.iterdir())


@contextlib.contextmanager
def claim(temporary: Path) -> Iterator[None]:
    """Mark a directory as in use until the block ends or the process dies.

    A save does so with its temporary directory, an upload with a committed one.
    """
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: see `_in_use`
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sweep(root: Path) -> list[Path]:
    """Delete what dead saves and deletions left behind; returns what was deleted."""
    left = [p for p in _children(root) if is_temporary(p) and p.is_dir() and not p.is_symlink()]
    swept = [path for path in left if not _in_use(path)]
    for path in swept:
        discard(path)
    return swept


def discard(path: Path) -> None:
    """Delete a checkpoint or a temporary directory.

    It is renamed first, so that a half-deleted checkpoint never has a committed name, and a
    save still working in a temporary directory fails at its own rename instead of
    committing what is left of it.
    """
    step = path.name.removeprefix("step_").split(".")[0]
    doomed = path.with_name(f"step_{step}{_TEMPORARY}deleted-{secrets.token_hex(4)}")
    with naming(path, "cannot be deleted"):
        os.rename(path, doomed)
        sync_directory(path.parent)
        shutil.rmtree(doomed)


def aside_name(name: str) -> str:
    """A name for a checkpoint that is set aside."""
    return f"{name}{_ASIDE}{secrets.token_hex(4)}"


def put_aside(path: Path) -> Path:
    """Rename a committed checkpoint so that no reader takes it for one of the run's."""
    aside = path.with_name(aside_name(path.name))
    with naming(path, "cannot be renamed"):
        os.rename(path, aside)
        sync_directory(path.parent)
    return aside


def is_claimed(path: Path) -> bool:
    """Whether a process holds a `claim`; False on file systems without locks."""
    try:
        return _is_locked(path) is True
    except OSError:
        return False


def _in_use(temporary: Path) -> bool:
    """Whether a live save is working there.

    The saving process holds a lock on the directory, which is released when it dies.  On file
    systems without locks, a directory unchanged for an hour counts as abandoned.
    """
    try:
        locked = _is_locked(temporary)
    except OSError:
        return True
    if locked is not None:
        return locked
    changes = [os.lstat(path).st_mtime for path in (temporary, *temporary.iterdir())]
    return time.time() - max(changes) < _QUIET_SECONDS


def _is_locked(path: Path) -> bool | None:
    """Whether a process holds a lock on a directory; None on file systems without locks.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


def find(path: Path) -> Path:
    """The checkpoint for a path: the path itself, or the newest of a run or a root of steps.

    Raises:
        CheckpointError: there is none.
    """
    if (path / NAME).is_file():
        return path
    for root in (path / "checkpoints", path):
        steps = list_steps(root) if root.is_dir() else []
        if steps:
            return step_path(root, steps[-1])
    raise CheckpointError(
        f"{path}: no checkpoint",
        expected="a checkpoint, or a run directory with a committed checkpoint in checkpoints/",
    )
