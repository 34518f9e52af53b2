"""A run's copies in the memory of its hosts (`checkpoint.memory_every`).

A start takes the newest state that it finds, in memory or in the run directory.  The copies are
deleted when the run ends or stops in order, since its last save is on disk then; after a failure
they stay for the next start.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagrow.checkpoint import CheckpointMeta, NativeCheckpoint
from megagrow.checkpoint.native.memory import HostMemory, MemoryCopy
from megagrow.checkpoint.native.steps import step_of
from megagrow.cluster import lifeline
from megagrow.config import Config
from megagrow.engine.comm import Comm
from megagrow.engine.engine import Engine
from megagrow.errors import CheckpointError
from megagrow.train import checkpoints
from megagrow.train.health.agree import on_first
from megagrow.train.health.run_lock import RUN_ID
from megagrow.train.logging.journal import Journal

VARIABLE = "MEGAGROW_MEMORY"  # a directory on a memory file system of the host
_USUAL = "/dev/shm"


class LostCopyError(CheckpointError):
    """A copy in memory that cannot be used."""


class MemoryCopies:
    """Copies of one run; without `checkpoint.memory_every` every method does nothing.

    Attributes:
        resumed: the copy that this job went on from, if it did.
    """

    def __init__(self, config: Config, comm: Comm, journal: Journal) -> None:
        self._every, self._run_dir = config.checkpoint.memory_every, Path(config.run.dir)
        self._comm, self._say, self._event = comm, journal.say, journal.event
        self._memory: HostMemory | None = None
        self._run = ""
        self._newest = -1  # the step that all hosts hold
        self.resumed: MemoryCopy | None = None
        self.begin(on_first(comm, self._known_run))

    def begin(self, run: str) -> None:
        """Hold copies of the run of this id; "" if it has none yet.

        Raises:
            CheckpointError: on all ranks; this host's memory cannot be used.
        """
        run = self._comm.broadcast(run)
        if run in ("", self._run):
            return
        if self._memory is not None:
            self._memory.close()  # another run began in run.dir
            self._memory = None
        self._run, self._newest = run, -1
        above = Path(os.environ.get(VARIABLE) or _USUAL)
        root = above.resolve() / f"megagrow-{run}"
        if self._every is None and not any(self._comm.all_gather(root.exists())):
            return
        self._memory = HostMemory(root, self._comm)
        if self._every is None:
            self._memory.close()  # of an earlier job, which had them
            self._memory = None
            return
        hosts = len(self._memory.hosts)
        self._say(
            f"copies of the state in the memory of {hosts} hosts every {self._every} steps, each "
            f"host's share on two ({root})"
            if hosts > 1
            else f"a copy of the state in this host's memory every {self._every} steps ({root}): "
            "it outlives a rank, but not the host, since there is no other"
        )

    def newer_than(self, resume: str, paths: Sequence[Path]) -> list[MemoryCopy]:
        """The newest whole copy, if a start is free to choose and none on disk is newer.

        Args:
            resume: as for `Trainer`.
            paths: the checkpoints on disk to resume from, best first.
        """
        if self._memory is None or resume not in ("auto", "good"):
            return []
        copy, faults = self._memory.newest()
        for fault in faults:
            self._say(f"warning: a copy in memory is passed over\n{fault}")
        on_disk = step_of(paths[0]) if paths else None
        newer = copy is not None and (on_disk is None or copy.step >= on_disk)
        return [copy] if copy is not None and newer else []

    def open(self, copy: MemoryCopy) -> NativeCheckpoint:
        """Open a copy to resume from.

        Raises:
            LostCopyError: on all ranks, if it is damaged or another run's.
        """
        assert self._memory is not None
        try:
            checkpoint = self._memory.open(copy)
        except CheckpointError as error:
            raise LostCopyError(str(error)) from error
        theirs = checkpoint.fingerprints.get(checkpoints.RUN)
        if theirs != self._run:
            raise LostCopyError(
                f"{checkpoint.path}: not this run's",
                found=f"run {theirs}",
                expected=f"run {self._run}",
            )
        self._newest, self.resumed = copy.step, copy
        return checkpoint

    @contextlib.contextmanager
    def at_hand(self, checkpoint: NativeCheckpoint, engine: Engine) -> Iterator[None]:
        """While it is read, have what this rank needs of an opened copy on its host.

        Raises:
            LostCopyError: on all ranks, if any file is damaged, here or while it is read.
        """
        if self.resumed is None:
            yield
            return
        try:
            self._fetch(self.resumed, checkpoint, engine)
            yield
        except CheckpointError as error:
            raise LostCopyError(
                f"{checkpoint.path}: this copy in memory cannot be used\n{error.__cause__ or error}"
            ) from error
        assert self._memory is not None
        self._memory.drop_fetched()
        self._memory.forget(but=self.resumed.step)  # what a killed copy left, too

    def _fetch(self, copy: MemoryCopy, checkpoint: NativeCheckpoint, engine: Engine) -> None:
        assert self._memory is not None
        placement, rank = engine.placement, self._comm.rank
        needed = {
            file
            for shard in placement.shards(rank)
            for file, _ in checkpoint.sources(shard.tensor, shard.box, reader=rank)
        }
        self._memory.fetch(copy, needed)

    def forget(self) -> None:
        """Delete all copies: the run goes on from a checkpoint on disk."""
        if self._memory is not None:
            self._memory.forget()
        self._newest, self.resumed = -1, None

    @property
    def kept(self) -> bool:
        """Whether this run has copies in memory."""
        return self._memory is not None

    def due(self, step: int) -> bool:
        """Whether a copy is to be made after this step."""
        return self._memory is not None and step % (self._every or 1) == 0

    def keep(self, step: int, engine: Engine, meta: CheckpointMeta) -> None:
        """Copy the state; if that fails, the run goes on with the copy before."""
        if self._memory is None or step == self._newest:
            return
        begin = time.perf_counter()
        try:
            pieces = checkpoints.finite(checkpoints.live_pieces(engine, self._comm.rank))
            count = self._memory.save(step, pieces=pieces, meta=meta)
        except CheckpointError as error:
            self._event("memory_copy_failed", step=step, why=str(error))
            self._say(f"warning: {error}\nThe run continues without this copy.")
            return
        self._newest = step
        seconds = time.perf_counter() - begin
        self._event("memory_copy", step=step, bytes=count, copy_seconds=seconds)
        lifeline.say("saved", step=step)

    def close(self) -> None:
        """Delete all copies: what they hold is on disk."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _known_run(self) -> str:
        """The id of the run in run.dir, if there is one."""
        path = self._run_dir / RUN_ID
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
        return text if re.fullmatch(r"[\w-]{1,64}", text) else ""
