"""Reading a native checkpoint: any box of any tensor, in bounded memory.

When a chunk of a file is first accessed, it is read whole and its checksum checked; later reads
fetch only the bytes that they need: see `stored_source`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from megagrow.checkpoint.interface.accounting import account, unread_files
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.stored_boxes import Record, StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.io.dtypes import DTYPES
from megagrow.checkpoint.io.files import (
    READING,
    RESTORE,
    naming,
    open_regular,
    read_exactly,
    read_small,
)
from megagrow.checkpoint.native import manifest as manifests
from megagrow.checkpoint.native.manifest import file_name
from megagrow.checkpoint.native.proof import Contents, prove
from megagrow.checkpoint.native.steps import is_temporary, step_of
from megagrow.errors import CheckpointError
from megagrow.state.layout import Layout


class NativeCheckpoint(StoredSource):
    """A committed checkpoint, open for reading; created by `open`."""

    def __init__(self, path: Path, contents: Contents, *, verify: bool) -> None:
        manifest = contents.manifest
        boxes = list(_boxes(contents))
        self.version = manifest.megagrow  # the megagrow version that wrote it
        super().__init__(
            path,
            meta=CheckpointMeta(
                catalog=contents.catalog,
                slots=contents.slots,
                layout=Layout(**manifest.layout.model_dump()),
                config=manifest.config,
                fingerprints=manifest.fingerprints,
                run_state=manifest.run_state,
            ),
            step=manifest.step,
            sizes={record.name: record.size for record in manifest.files},
            boxes=boxes,
            proved=True,
            records=_records(contents),
            left_out=account(
                (f"{name}@{slot}" for name, slot in contents.stored),
                carried={f"{box.tensor}@{box.slot}" for box in boxes},
            )
            + tuple(unread_files(path, {manifests.NAME, *(file.name for file in manifest.files)})),
        )
        self.compare_when_read = verify

    @staticmethod
    def open(
        path: Path, *, verify: bool = True, files: Collection[int] | None = None
    ) -> NativeCheckpoint:
        """Open a checkpoint: check the manifest, and each file's size and header.

        Args:
            verify: whether reads check checksums (each chunk once).
            files: ranks whose files are there, if not all are (`native.memory`).

        Raises:
            CheckpointError: missing, damaged, incomplete, hostile or of another version.
        """
        where = path / manifests.NAME
        if not path.is_dir() or is_temporary(path) or not os.path.lexists(where):
            raise CheckpointError(
                f"{path}: not a committed checkpoint",
                found=_looks_like(path),
                expected=f"a directory with {manifests.NAME}",
            )
        contents = prove(
            manifests.unseal(read_small(where, manifests.BYTES_LIMIT), where=str(where)),
            where=str(where),
        )
        named = step_of(path)
        if named is not None and named != contents.manifest.step:
            raise CheckpointError(
                f"{where}: its step is not that of the directory's name",
                found=f"step {contents.manifest.step}",
                expected=f"step {named}",
            )
        for rank, record in enumerate(contents.manifest.files):
            if files is not None and rank not in files:
                continue
            _check_head(path / file_name(rank), record.size, contents.heads[rank])
        return NativeCheckpoint(path, contents, verify=verify)


def _boxes(contents: Contents) -> Iterator[StoredBox]:
    for (name, slot), parts in contents.stored.items():
        for item in parts:
            dtype = DTYPES[item.part.dtype]
            yield StoredBox(name, slot, item.part.box, file_name(item.file), item.start, dtype)


def _records(contents: Contents) -> Iterator[Record]:
    size = contents.manifest.chunk_bytes
    for file in contents.manifest.files:
        for number, stated in enumerate(file.crc32):
            start = number * size
            yield Record(file.name, start, min(size, file.size - start), int(stated, 16))


def _check_head(path: Path, size: int, head: bytes) -> None:
    with open_regular(path) as (descriptor, found):
        if found != size:
            raise CheckpointError(
                f"{path}: truncated, or from another checkpoint",
                found=f"{found} bytes",
                expected=f"{size} bytes",
                fix=RESTORE,
            )
        data = bytearray(len(head))
        with naming(path, "cannot be read", READING):
            complete = read_exactly(descriptor, memoryview(data), 0)
        if not complete or data != head:
            raise CheckpointError(
                f"{path}: damaged, or from another checkpoint",
                found="a header that disagrees with the manifest",
                fix=RESTORE,
            )


def _looks_like(path: Path) -> str:
    if not path.exists():
        return "nothing by that name"
    if not path.is_dir():
        return "a file"
    if is_temporary(path):
        return "a save that was never finished"
    return f"a directory without {manifests.NAME}"
