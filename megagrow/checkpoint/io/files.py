"""Names in a checkpoint directory, and their life cycle.

    step_00000040                      committed: complete, never written again
    step_00000040.tmp-<nonce>          a save in progress, or one that died
    step_00000040.set-aside-<nonce>    newer than the step that a run went back to

A name appears and disappears by one rename, so a reader that goes by names never takes a partial
checkpoint for a complete one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from megagrow.errors import CheckpointError

_WRITING = {
    errno.ENOSPC: "free disk space, or keep fewer checkpoints (checkpoint.keep)",
    errno.EDQUOT: "free disk space within your quota, or keep fewer checkpoints (checkpoint.keep)",
    errno.EACCES: "give this user the right to write there, or set run.dir to another directory",
    errno.EPERM: "give this user the right to write there, or set run.dir to another directory",
    errno.EROFS: "mount it writable, or set run.dir to a directory that is",
    errno.EIO: "check the disk (its driver reported a failure), or set run.dir to another one",
    errno.ENOENT: "set run.dir to a directory that every host of the job sees",
}
RESTORE = "restore the file from a copy, or resume from another checkpoint"
READING = {
    errno.ENOENT: RESTORE,
    errno.EACCES: "give this user the right to read it",
    errno.EIO: "check the disk (its driver reported a failure); " + RESTORE,
    errno.ELOOP: "put the file itself in place of the link",
}


@contextlib.contextmanager
def naming(path: Path, fault: str, fixes: Mapping[int, str] = _WRITING) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that says `path: fault` and the system's reason."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "no errno")
        raise CheckpointError(
            f"{path}: {fault}",
            found=f"{error.strerror or error} ({code})",
            fix=fixes.get(error.errno or 0),
        ) from error


@contextlib.contextmanager
def laid_out(path: Path, how: str) -> Iterator[None]:
    """Turn errors from parsing an unexpected structure into a CheckpointError.

    Args:
        how: description of the expected layout.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not laid out as {how}",
            found=f"{type(error).__name__}: {error}"[:300],
            fix=RESTORE,
        ) from None


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """A read-only descriptor of a regular file, and its size in bytes.

    Links, directories and pipes are refused: a hand-made checkpoint must not redirect the reader or
    make it block.  Links that stay within one model's part of Hugging Face's cache are followed.
    """
    with naming(path, "cannot be opened", READING):
        descriptor = os.open(
            _blob(path) or path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file", expected="a regular file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _blob(path: Path) -> Path | None:
    """The link target of a file in Hugging Face's cache, if it is where that cache keeps its files.

    models--NAME/snapshots/<revision>/.../FILE is a link to models--NAME/blobs/<digest>.
    """
    if not path.is_symlink():
        return None
    path = path.absolute()
    target = Path(os.path.realpath(path))
    caches = (folder.parent for folder in path.parents if folder.name == "snapshots")
    blobs = (Path(os.path.realpath(cache / "blobs")) for cache in caches)
    return target if target.parent in blobs else None


def read_exactly(descriptor: int, data: memoryview, offset: int) -> bool:
    """Fill `data` from a position of a file; False if the file ends first."""
    while data:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            return False
        data, offset = data[count:], offset + count
    return True


def read_small(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes (CheckpointError)."""
    with open_regular(path) as (descriptor, size), naming(path, "cannot be read", READING):
        if size > limit:
            raise CheckpointError(
                f"{path}: too long",
                found=f"{size} bytes",
                expected=f"at most {limit} bytes",
                fix=RESTORE,
            )
        data = bytearray(size)
        if not read_exactly(descriptor, memoryview(data), 0):
            raise CheckpointError(f"{path}: changed while it is read", fix=RESTORE)
        return bytes(data)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all bytes, repeating short writes."""
    while data:
        written = os.write(descriptor, data)
        if written == 0:
            raise OSError(errno.EIO, "the system wrote nothing and reported no error")
        data = data[written:]


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, and fsync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- names --------------------------------------------------------------------------------


# --- life cycle ---------------------------------------------------------------------------
