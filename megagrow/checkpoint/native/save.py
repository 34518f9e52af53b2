"""Saving: every rank writes the boxes it holds, rank 0 commits.

Order: files, fsync of each, manifest, fsync, fsync of the directory, rename,
fsync of the parent.  The rename is the commit: readers see nothing before it and everything
after it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.io.checksum import CHUNK_BYTES, checksum_count
from megagrow.checkpoint.io.files import naming, write_new
from megagrow.checkpoint.native import manifest as manifests
from megagrow.checkpoint.native.collective import Group, together
from megagrow.checkpoint.native.manifest import NO_CHECKSUM, file_name, file_record, stamp
from megagrow.checkpoint.native.proof import prove
from megagrow.checkpoint.native.retention import free_bytes, free_room
from megagrow.checkpoint.native.shard_file import (
    Piece,
    file_order,
    lay_out,
    part_of,
    write_shard,
)
from megagrow.checkpoint.native.steps import claim, step_path, sweep, temporary_path
from megagrow.errors import CheckpointError
from megagrow.files import sync_directory

_log = logging.getLogger(__name__)


def save(
    root: Path,
    *,
    step: int,
    pieces: Iterable[Piece],
    meta: CheckpointMeta,
    group: Group,
    chunk_bytes: int = CHUNK_BYTES,
    keep: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Save a checkpoint; every rank of the group calls it with its own pieces.

    Together the pieces tile every slot of every tensor of `meta.catalog` exactly once.
    Their values may be views of live state, on any device and with any strides, and must
    not change until the call returns.  They are copied through one buffer of `chunk_bytes`.

    Args:
        root: the directory of the run's checkpoints, on storage shared by all ranks.
        meta: used on rank 0 only.
        chunk_bytes: size of the buffer and of a checksummed chunk, a multiple of 8.
        keep: number of checkpoints kept after this one; if the disk is full, some are deleted
            before the save (`megagrow.checkpoint.native.retention`).  None deletes none.
        say: called on rank 0 with what was deleted for this save, and why.

    Returns:
        The committed directory, `root/step_<step>`.

    Raises:
        CheckpointError: on every rank alike, if any rank failed; nothing is committed, partial
            files are removed where possible, and earlier checkpoints are unchanged except those
            deleted for lack of space.
    """
    save_id = group.broadcast(secrets.token_hex(8) if group.rank == 0 else None)
    temporary = temporary_path(root, step, save_id)
    failing = f"{step_path(root, step)}: not saved; earlier checkpoints are as they were"
    shard = OwnFile(pieces, save=save_id, step=step, rank=group.rank, chunk_bytes=chunk_bytes)
    book = ManifestOf(meta, save=save_id, step=step, chunk_bytes=chunk_bytes)

    def undo() -> None:
        shutil.rmtree(temporary, ignore_errors=True)

    with contextlib.ExitStack() as held:

        def prepare(records: list[dict[str, Any]]) -> None:
            needed = book.prove(records)
            _make_room(root, step, needed, keep=keep, say=say)
            with naming(temporary, "cannot be made"):
                temporary.mkdir()
                held.enter_context(claim(temporary))

        def seal(checksums: list[list[str]]) -> None:
            commit(root, temporary, step_path(root, step), book.sealed(checksums))

        together(group, shard.plan, prepare, failing=failing, undo=undo)
        together(group, lambda: shard.write(temporary), seal, failing=failing, undo=undo)
    return step_path(root, step)


class OwnFile:
    """A rank's file of a save: planned, then written.

    Args:
        pieces: as for `save`.
        save: the save's random name.
    """

    def __init__(
        self, pieces: Iterable[Piece], *, save: str, step: int, rank: int, chunk_bytes: int
    ) -> None:
        self._pieces, self._rank, self._chunk_bytes = pieces, rank, chunk_bytes
        self._stamp = stamp(save=save, step=step, rank=rank)

    def plan(self) -> dict[str, Any]:
        """The file's record, with blank checksums."""
        self._ordered = file_order(self._pieces)
        parts = [part_of(piece) for piece in self._ordered]
        self._plan = lay_out(parts, self._stamp)
        blanks = [NO_CHECKSUM] * checksum_count(self._plan.size, self._chunk_bytes)
        return file_record(self._rank, parts, self._plan, blanks)

    def write(self, directory: Path) -> list[str]:
        """Write it; returns the checksum of each chunk.  `plan` comes first."""
        path = directory / file_name(self._rank)
        return write_shard(path, self._plan.head, self._ordered, chunk_bytes=self._chunk_bytes)


class ManifestOf:
    """The manifest of a save, on rank 0: proved before anything is written, sealed afterwards."""

    def __init__(self, meta: CheckpointMeta, *, save: str, step: int, chunk_bytes: int) -> None:
        self._meta, self._save, self._step, self._chunk_bytes = meta, save, step, chunk_bytes
        self._files: list[dict[str, Any]] = []

    def prove(self, records: list[dict[str, Any]]) -> int:
        """Check what a reader would; returns the bytes of all files and the manifest.

        With blank checksums the manifest already has its final size.

        Raises:
            CheckpointError: a reader would refuse it.
        """
        self._files = records
        text, where = self._text(), f"step {self._step}"
        if len(text) > manifests.BYTES_LIMIT:
            raise CheckpointError(f"{where}: {len(text)} bytes of manifest are too many")
        prove(manifests.unseal(text, where=where), where=where)
        return sum(file["size"] for file in records) + len(text)

    def sealed(self, checksums: Sequence[Sequence[str]]) -> bytes:
        """The manifest's bytes, with the checksums of each rank's file."""
        for file, sums in zip(self._files, checksums, strict=True):
            file["crc32"] = list(sums)
        return self._text()

    def _text(self) -> bytes:
        return manifests.seal(
            self._meta,
            save=self._save,
            step=self._step,
            chunk_bytes=self._chunk_bytes,
            files=self._files,
        )


def _make_room(
    root: Path, step: int, needed: int, *, keep: int | None, say: Callable[[str], None]
) -> None:
    """Create the root; check that the step is not committed yet and that the disk has space."""
    with naming(root, "cannot be made"):
        root.mkdir(parents=True, exist_ok=True)
        sync_directory(root.parent)
    _refuse_existing(step_path(root, step), step)
    with naming(root, "cannot be examined"):
        if free_bytes(root) < needed:
            with _only_logged("leftovers of dead saves not removed"):
                sweep(root)
        free_room(root, needed=needed, keep=keep, say=say)


def _refuse_existing(path: Path, step: int) -> None:
    if not os.path.lexists(path):
        return
    committed = (path / manifests.NAME).is_file()
    raise CheckpointError(
        f"{path}: a committed checkpoint is never overwritten",
        found=f"step {step} is saved there already" if committed else "something else is there",
        fix=f"resume from it, or move it away: mv {path} {path}.old",
    )


def commit(root: Path, temporary: Path, final: Path, manifest: bytes) -> None:
    """Write the manifest, sync, and rename to the final name; then remove old leftovers."""
    with naming(temporary / manifests.NAME, "cannot be written"):
        write_new(temporary / manifests.NAME, manifest)
    with naming(temporary, "cannot be synchronised"):
        sync_directory(temporary)  # the names of all files, including the manifest
    with naming(final, "cannot be committed"):
        os.rename(temporary, final)
    with naming(
        root, f"cannot be synchronised; {final.name} is whole, but a power cut may lose it"
    ):
        sync_directory(root)
    with _only_logged("leftovers of dead saves not removed"):
        sweep(root)


@contextlib.contextmanager
def _only_logged(what: str) -> Iterator[None]:
    """For cleanup whose failure must not fail a save."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        _log.warning("%s: %s", what, error)
