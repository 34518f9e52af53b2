"""Copies of a run's state in the memory of its hosts, each host's share also in another's.

A copy is a native checkpoint whose files are spread over the hosts.  Each host has, in a directory
of a memory file system, the manifest, the files of its own ranks, and those of the host before it:

    megagrow-<run>/step_00000040/manifest.json             the same on all hosts
    megagrow-<run>/step_00000040/rank_00002.safetensors    of this host's rank
    megagrow-<run>/step_00000040/rank_00000.safetensors    of the host before it

They survive the death of any rank, and the loss of any one host (of two that are not neighbours,
too).  A copy counts if the hosts together have all its files, of one save.  The one before it is
deleted when all hosts have the next.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.io.checksum import CHUNK_BYTES
from megagrow.checkpoint.io.files import (
    naming,
    read_small,
    write_new,
)
from megagrow.checkpoint.native import manifest as manifests
from megagrow.checkpoint.native.between_hosts import FileTransfer, Peers, send_files
from megagrow.checkpoint.native.collective import together
from megagrow.checkpoint.native.manifest import Manifest, file_name
from megagrow.checkpoint.native.retention import free_bytes
from megagrow.checkpoint.native.save import ManifestOf, OwnFile
from megagrow.checkpoint.native.shard_file import Piece
from megagrow.checkpoint.native.source import NativeCheckpoint
from megagrow.checkpoint.native.steps import (
    discard,
    list_steps,
    step_path,
    sweep,
    temporary_path,
)
from megagrow.errors import CheckpointError

IN_MEMORY = ("tmpfs", "ramfs")
_PROBE = "probe-"
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryCopy:
    """A whole copy, found in the memory of the hosts.

    Attributes:
        holders: for each rank's file, the ranks that can send it, one a host.
    """

    step: int
    save: str
    holders: Mapping[int, Sequence[int]] = field(repr=False)


class HostMemory:
    """This host's part of a run's copies; all ranks make it, and call every method, together.

    Args:
        root: the run's directory on a memory file system, created if it is not there.
        ranks: of the job.

    Raises:
        CheckpointError: on all ranks; it is on a disk, belongs to another user, or cannot be made.
    """

    def __init__(self, root: Path, ranks: Peers) -> None:
        self.root, self._ranks = root, ranks
        nonce = ranks.broadcast(secrets.token_hex(8) if ranks.rank == 0 else None)
        probe = root / f"{_PROBE}{nonce}-{ranks.rank}"

        def show() -> None:
            _make(root)
            with naming(probe, "cannot be made", {}):
                probe.touch()

        self._together(show, f"{root}: no copies in memory")
        # Those whose files this rank sees are on its host, whatever hosts are named.
        seen = sorted(int(p.name.rpartition("-")[2]) for p in root.glob(f"{_PROBE}{nonce}-*"))
        views: list[list[int]] = ranks.all_gather(seen)
        probe.unlink()
        self.hosts = list(dict.fromkeys(map(tuple, views)))
        self._home = next(i for i, host in enumerate(self.hosts) if ranks.rank in host)
        self._first = ranks.rank == self.hosts[self._home][0]
        self._fetched: list[Path] = []
        if self._first:
            for left in root.glob(f"{_PROBE}*"):
                if not left.name.startswith(f"{_PROBE}{nonce}"):
                    left.unlink(missing_ok=True)
            sweep(root)

    # --- save -----------------------------------------------------------------------------

    def save(self, step: int, *, pieces: Iterable[Piece], meta: CheckpointMeta) -> int:
        """Copy the state of a step; the arguments are those of `native.save.save`.

        While it is written, a host needs the memory of two copies of its own share and of that of
        the host before it: the previous one goes when all hosts have this one.

        Returns:
            Bytes that this host holds of it.

        Raises:
            CheckpointError: on all ranks, if any failed; the previous copy is as it was.
        """
        ranks = self._ranks
        save = ranks.broadcast(secrets.token_hex(8) if ranks.rank == 0 else None)
        here, path = temporary_path(self.root, step, save), step_path(self.root, step)
        try:
            held = self._write(here, step, save, pieces, meta)
            self._together(lambda: self._commit(here, path), f"{path}: not kept in memory")
        except CheckpointError:
            if self._first:
                shutil.rmtree(here, ignore_errors=True)
            raise
        self.forget(but=step)
        return held

    def _write(
        self, here: Path, step: int, save: str, pieces: Iterable[Piece], meta: CheckpointMeta
    ) -> int:
        ranks, failing = self._ranks, f"step {step}: not kept in memory"
        shard = OwnFile(pieces, save=save, step=step, rank=ranks.rank, chunk_bytes=CHUNK_BYTES)
        book = ManifestOf(meta, save=save, step=step, chunk_bytes=CHUNK_BYTES)

        def plan(records: list[dict[str, Any]]) -> list[int]:
            book.prove(records)
            return [record["size"] for record in records]

        sizes = together(ranks, shard.plan, plan, failing=failing, undo=_nothing)
        transfers = [FileTransfer(r, r, self._keeper(r)) for r in range(ranks.world)]
        transfers = [t for t in transfers if t.receiver not in self._host_of(t.sender)]
        home = self.hosts[self._home]
        arriving = [t.file for t in transfers if t.receiver in home]
        held = sum(sizes[file] for file in [*home, *arriving])
        self._together(lambda: self._make_room(here, held), failing)
        text = together(
            ranks, lambda: shard.write(here), book.sealed, failing=failing, undo=_nothing
        )
        manifest = manifests.unseal(text, where=str(here))
        self._together(lambda: send_files(here, manifest.files, transfers, ranks), failing)
        if self._first:
            self._text = text
        return held

    def _make_room(self, here: Path, needed: int) -> None:
        if not self._first:
            return
        free = int(min(free_bytes(self.root), psutil.virtual_memory().available))
        if needed > free:
            raise CheckpointError(
                f"{self.root}: too little memory for a copy of the state",
                found=f"{free:,} bytes free",
                expected=f"{needed:,} bytes, besides the copy before it",
                fix="use more hosts, or turn the copies off with checkpoint.memory_every=null",
            )
        with naming(here, "cannot be made", {}):
            here.mkdir()

    def _commit(self, here: Path, path: Path) -> None:
        if not self._first:
            return
        with naming(path, "cannot be written", {}):
            write_new(here / manifests.NAME, self._text)
            if path.exists():  # of a save that not all hosts have finished, or of before a growth
                discard(path)
            os.rename(here, path)

    def _host_of(self, rank: int) -> tuple[int, ...]:
        return next(host for host in self.hosts if rank in host)

    def _keeper(self, rank: int) -> int:
        """The rank of the next host that keeps a rank's file too."""
        host = self._host_of(rank)
        following = self.hosts[(self.hosts.index(host) + 1) % len(self.hosts)]
        return following[host.index(rank) % len(following)]

    # --- resume ---------------------------------------------------------------------------

    def newest(self) -> tuple[MemoryCopy | None, list[str]]:
        """The newest whole copy, or None; and what is damaged, in words."""
        found, faults = self._held() if self._first else ({}, [])
        rows = self._ranks.all_gather((found, faults))
        holders: dict[tuple[int, str], dict[int, list[int]]] = {}
        worlds: dict[tuple[int, str], int] = {}
        for rank, (copies, _) in enumerate(rows):
            for key, (world, files) in copies.items():
                worlds[key] = world
                for file in files:
                    holders.setdefault(key, {}).setdefault(file, []).append(rank)
        whole = [key for key, world in worlds.items() if len(holders.get(key, ())) == world]
        said = [fault for _, told in rows for fault in told]
        for step, save in sorted(set(worlds) - set(whole)):
            there = len(holders.get((step, save), ()))
            said.append(
                f"the copy of step {step} is not whole: {there} of {worlds[step, save]} files of "
                "ranks are there, undamaged in size"
            )
        if not whole:
            return None, said
        step, save = max(whole)
        return MemoryCopy(step, save, holders[step, save]), said

    def _held(self) -> tuple[dict[tuple[int, str], tuple[int, list[int]]], list[str]]:
        """What is here: (number of all files, those that are here) by step and save."""
        found, faults = {}, []
        for step in list_steps(self.root):
            path = step_path(self.root, step)
            try:
                manifest = self._manifest(path)
            except CheckpointError as error:
                faults.append(str(error))
                continue
            files = _files_at(path, manifest)
            found[manifest.step, manifest.save] = manifest.world, files
        return found, faults

    def open(self, copy: MemoryCopy) -> NativeCheckpoint:
        """Open a copy; reading needs the files that `fetch` brings.

        Raises:
            CheckpointError: on all ranks, if it is damaged on any host.
        """
        path = step_path(self.root, copy.step)
        failing = f"{path}: cannot be read from memory"
        sender = min(rank for held in copy.holders.values() for rank in held)

        def read() -> bytes | None:
            where = path / manifests.NAME
            mine = self._ranks.rank == sender
            return read_small(where, manifests.BYTES_LIMIT) if mine else None

        text: bytes = self._ranks.all_gather(self._together(read, failing))[sender]

        def settle() -> None:
            """Have the manifest on hosts that lack it."""
            if not self._first or (path.exists() and self._manifest(path).save == copy.save):
                return
            if path.exists():
                discard(path)
            here = temporary_path(self.root, copy.step, copy.save)
            with naming(path, "cannot be made", {}):
                here.mkdir()
                write_new(here / manifests.NAME, text)
                os.rename(here, path)

        self._together(settle, failing)

        def look() -> NativeCheckpoint:
            return NativeCheckpoint.open(path, files=_files_at(path, self._manifest(path)))

        return self._together(look, failing)

    def fetch(self, copy: MemoryCopy, needed: Collection[int]) -> None:
        """Bring the files that this rank needs, but its host lacks, from the hosts that have them.

        They stay until `drop_fetched`.

        Raises:
            CheckpointError: on all ranks, if any failed, or a file does not have its checksums.
        """
        path = step_path(self.root, copy.step)
        manifest = self._manifest(path)
        here = _files_at(path, manifest)
        rows = self._ranks.all_gather(sorted(set(needed) - set(here)))
        transfers = []
        for number, host in enumerate(self.hosts):
            for file in sorted({file for rank in host for file in rows[rank]}):
                held = copy.holders[file]
                transfers.append(FileTransfer(file, held[number % len(held)], host[0]))
        failing = f"{path}: not fetched from other hosts' memory"
        self._fetched = [
            path / file_name(t.file) for t in transfers if t.receiver == self._ranks.rank
        ]
        self._together(lambda: send_files(path, manifest.files, transfers, self._ranks), failing)

    def drop_fetched(self) -> None:
        """Delete what `fetch` brought to this host."""
        for path in self._fetched:
            path.unlink(missing_ok=True)
        self._fetched = []

    # --- the end --------------------------------------------------------------------------

    def forget(self, *, but: int = -1) -> None:
        """Delete the copies of all steps except one."""
        if self._first:
            for step in list_steps(self.root):
                if step != but:
                    discard(step_path(self.root, step))

    def close(self) -> None:
        """Delete all copies and the directory."""
        if self._first:
            shutil.rmtree(self.root, ignore_errors=True)

    # --- all ranks alike ------------------------------------------------------------------

    def _together(self, work: Callable[[], T], failing: str) -> T:
        """Run work on all ranks; all fail if one does."""
        results: list[T] = []

        def keep() -> None:
            results.append(work())

        together(self._ranks, keep, lambda _: None, failing=failing, undo=_nothing)
        return results[0]

    def _manifest(self, path: Path) -> Manifest:
        where = path / manifests.NAME
        return manifests.unseal(read_small(where, manifests.BYTES_LIMIT), where=str(where))


def _files_at(path: Path, manifest: Manifest) -> list[int]:
    """The ranks whose files are there, with the size that they must have."""
    sizes = {entry.name: entry.lstat().st_size for entry in path.iterdir()}
    return [n for n, file in enumerate(manifest.files) if sizes.get(file_name(n)) == file.size]


def _make(root: Path) -> None:
    """Make the directory for this user alone, in memory."""
    parts = [part for part in psutil.disk_partitions(all=True) if part.mountpoint]
    above = [part for part in parts if root.is_relative_to(part.mountpoint)]
    kind = max(above, key=lambda part: len(part.mountpoint)).fstype if above else "unknown"
    if kind not in IN_MEMORY:
        raise CheckpointError(
            f"{root.parent}: not a file system in memory",
            found=kind,
            expected=" or ".join(IN_MEMORY),
            fix="let MEGAGROW_MEMORY name a directory on one, or unset it for /dev/shm",
        )
    with naming(root, "cannot be made", {}):
        root.mkdir(mode=0o700, exist_ok=True)
        status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise CheckpointError(
            f"{root}: belongs to someone else",
            found=f"user {status.st_uid}, mode {stat.filemode(status.st_mode)}",
            expected=f"a directory of user {os.geteuid()}",
            fix="have it removed, or let MEGAGROW_MEMORY name another directory",
        )


def _nothing() -> None:
    """Nothing to undo: each host removes its own."""
