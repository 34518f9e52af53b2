"""Files of a checkpoint sent from host to host, through the job's own process group.

They go in chunks of `CHUNK_BYTES`, one on its way in each direction; a chunk is written only if it
has the checksum that the manifest states, and a file gets its name when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megagrow.checkpoint.io.checksum import CHUNK_BYTES, checksum, checksum_count
from megagrow.checkpoint.io.files import RESTORE, naming, open_regular, read_exactly, write_all
from megagrow.checkpoint.native.collective import Group
from megagrow.checkpoint.native.manifest import FileRecord
from megagrow.errors import CheckpointError


class Peers(Group, Protocol):
    """The ranks of a job; `exchange` is called by both sides."""

    device: torch.device  # of the tensors that `exchange` takes

    def all_gather(self, item: Any) -> list[Any]:
        """Every rank's small object in rank order, on every rank."""

    def exchange(
        self, *, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> None:
        """Send one flat tensor and receive another."""


@dataclass(frozen=True)
class FileTransfer:
    """A file to be sent: the rank that wrote it, and the ranks that send and receive it."""

    file: int
    sender: int
    receiver: int


def send_files(
    here: Path, files: Sequence[FileRecord], transfers: Sequence[FileTransfer], ranks: Peers
) -> None:
    """Send files from memory to memory; every rank calls it with the same transfers.

    A rank that fails goes on to the end, so that no other waits for it.

    Args:
        here: the directory, on each host its own, that files are read from and written to.
        files: of the manifest, which has their checksums.

    Raises:
        CheckpointError: on the ranks that failed.
    """
    rank, faults = ranks.rank, list[CheckpointError]()
    for turn in rounds(transfers):
        out = next((t for t in turn if t.sender == rank), None)
        into = next((t for t in turn if t.receiver == rank), None)
        if out is None and into is None:
            continue
        leaving = None if out is None else _Leaving(here, files[out.file])
        arriving = None if into is None else _Arriving(here, files[into.file])
        ends = [end for end in (leaving, arriving) if end is not None]
        for chunk in range(max(end.chunks for end in ends)):
            send = leaving.chunk(chunk) if leaving and chunk < leaving.chunks else None
            receive = None
            if arriving and chunk < arriving.chunks:
                receive = torch.empty(arriving.size(chunk), dtype=torch.uint8, device=ranks.device)
            ranks.exchange(
                send=None if send is None else send.to(ranks.device),
                to=-1 if out is None else out.receiver,
                receive=receive,
                source=-1 if into is None else into.sender,
            )
            if arriving and receive is not None:
                arriving.take(chunk, receive.cpu())
        faults += [fault for end in ends if (fault := end.close()) is not None]
    if faults:
        raise faults[0]


class _End:
    """One end of a file that is sent; the first fault is kept, and the chunks go on."""

    def __init__(self, here: Path, record: FileRecord) -> None:
        self.path, self.record = here / record.name, record
        self.chunks = checksum_count(record.size, CHUNK_BYTES)
        self.fault: CheckpointError | None = None

    def size(self, chunk: int) -> int:
        """Bytes of a chunk."""
        return min(CHUNK_BYTES, self.record.size - chunk * CHUNK_BYTES)


class _Leaving(_End):
    def chunk(self, number: int) -> torch.Tensor:
        """A chunk as bytes; anything, if it cannot be read, since its checksum will tell."""
        data = torch.empty(self.size(number), dtype=torch.uint8)
        try:
            with open_regular(self.path) as (descriptor, _), naming(self.path, "cannot be read"):
                if not read_exactly(descriptor, data.numpy().data, number * CHUNK_BYTES):
                    raise CheckpointError(f"{self.path}: truncated", fix=RESTORE)
        except CheckpointError as error:
            self.fault = self.fault or error
        return data

    def close(self) -> CheckpointError | None:
        """The first fault."""
        return self.fault


class _Arriving(_End):
    def __init__(self, here: Path, record: FileRecord) -> None:
        super().__init__(here, record)
        self._part = self.path.with_name(f"{record.name}.part")
        self._descriptor = -1

    def take(self, number: int, data: torch.Tensor) -> None:
        """Check and write a chunk."""
        if self.fault is not None:
            return
        try:
            found, stated = checksum(data.numpy().data), self.record.crc32[number]
            if found != stated:
                raise CheckpointError(
                    f"{self.path}: damaged on its way between hosts, or where it came from",
                    found=f"CRC-32 {found} of chunk {number}",
                    expected=f"CRC-32 {stated}",
                )
            with naming(self._part, "cannot be written", {}):
                if self._descriptor < 0:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                    self._descriptor = os.open(self._part, flags, 0o600)
                write_all(self._descriptor, data.numpy().data)
        except CheckpointError as error:
            self.fault = error

    def close(self) -> CheckpointError | None:
        """Give the file its name, if it is whole; else the first fault."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self.fault is None:
            os.rename(self._part, self.path)
        else:
            self._part.unlink(missing_ok=True)
        return self.fault


def rounds(transfers: Iterable[FileTransfer]) -> list[list[FileTransfer]]:
    """Transfers in rounds in which each rank sends at most one file, and receives at most one."""
    found: list[list[FileTransfer]] = []
    for one in transfers:
        for turn in found:
            if all(one.sender != t.sender and one.receiver != t.receiver for t in turn):
                turn.append(one)
                break
        else:
            found.append([one])
    return found
