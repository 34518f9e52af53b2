"""When a run's checkpoints are written: in the foreground, or during the following steps.

An asynchronous save copies this rank's state to host memory and returns; a thread then writes,
syncs and commits as a foreground save does, over its own process groups, so that its messages
never mix with those of training.  Ranks finish at different steps; while a save is in progress
they exchange their status after every step, and only when all have finished do all continue
from it, or all fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagrow.background import Task
from megagrow.checkpoint import CheckpointMeta, Piece, step_path
from megagrow.config import Config
from megagrow.data.run_data import RunData
from megagrow.engine.comm import Comm
from megagrow.engine.engine import Engine
from megagrow.state.boxes import Box
from megagrow.train import checkpoints
from megagrow.train.health.agree import on_first
from megagrow.train.health.run_lock import RunLock
from megagrow.train.in_memory import MemoryCopies
from megagrow.train.state import RunState


class _SideComm(Comm):
    """A second communicator over all ranks, for small objects in host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self._side = dist.new_group(backend="gloo")

    def gather(self, item: Any) -> list[Any] | None:
        items = [None] * self.world if self.rank == 0 else None
        dist.gather_object(item, items, dst=0, group=self._side)
        return items

    def all_gather(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self._side)
        return items

    def broadcast(self, item: Any) -> Any:
        box = [item]
        dist.broadcast_object_list(box, src=0, device=self.device, group=self._side)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self._side)


class Saver:
    """Saves a run, one checkpoint at a time; all ranks call all methods together.

    Args:
        root: the run's directory of checkpoints.
        lock: without it nothing is written or deleted.
        run: the run's id (on rank 0).
        copies: in the memory of hosts; one is made with each save.
        say: called on rank 0 with which old checkpoints were deleted on a full disk.
    """

    def __init__(
        self,
        *,
        root: Path,
        config: Config,
        data: RunData,
        comm: Comm,
        lock: RunLock,
        run: str,
        copies: MemoryCopies,
        say: Callable[[str], None] = print,
    ) -> None:
        self._say = say
        self._root, self._config, self._data, self._comm = root, config, data, comm
        self._lock, self._run, self._in_memory = lock, run, copies
        self._pending: tuple[int, Task[Path]] | None = None
        self._buffers: dict[tuple[str, str, Box], torch.Tensor] = {}
        wanted = config.checkpoint.asynchronous
        beside = comm.device.type == "cuda" if wanted is None else wanted
        self._side = _SideComm() if beside else None

    def save(
        self, engine: Engine, state: RunState, *, known: Path | None
    ) -> tuple[int, Path] | None:
        """Save; returns (step, checkpoint), or None if it is still being written.

        The previous save must have finished.  If this very state is already saved, nothing is
        done.

        Args:
            known: the checkpoint that this job last wrote, or started from.

        Raises:
            LockError: on all ranks: this job has lost run.dir.
            MegagrowError: on all ranks; earlier checkpoints are unchanged.
        """
        assert self._pending is None
        self.copy(engine, state)
        path = step_path(self._root, state.step)

        def saved_already() -> bool:
            self._lock.require()
            return checkpoints.is_saved(path, state, run=self._run, known=known)

        if on_first(self._comm, saved_already):
            return state.step, path
        write = partial(
            checkpoints.write_run,
            root=self._root,
            step=state.step,
            meta=self._meta(engine, state),
            keep=self._config.checkpoint.keep,
            lock=self._lock,
            say=self._say,
        )
        if self._side is None:
            return state.step, write(
                pieces=checkpoints.live_pieces(engine, self._comm.rank), comm=self._comm
            )
        beside = partial(write, pieces=self._copies(engine), comm=self._side)
        self._pending = state.step, Task("checkpoint", beside)
        return None

    def copy(self, engine: Engine, state: RunState) -> None:
        """Copy the state to the memory of the hosts, if `checkpoint.memory_every` is set."""
        if self._in_memory.kept:
            self._in_memory.keep(state.step, engine, self._meta(engine, state))

    def poll(self) -> tuple[int, Path] | None:
        """The save that all ranks have finished since the last call, if any: (step, checkpoint).

        Raises:
            MegagrowError: on all ranks, if it failed.
        """
        if self._pending is None:
            return None
        done = self._comm.sum_ints(int(self._pending[1].done()))
        return self.wait() if done == self._comm.world else None

    def wait(self) -> tuple[int, Path] | None:
        """Like `poll`, but waits for the save in progress."""
        if self._pending is None:
            return None
        (step, task), self._pending = self._pending, None
        return step, task.result()

    def close(self) -> None:
        """Let a save in progress finish, so that a failed run still reports its errors."""
        if self._pending is not None:
            self._pending[1].close()

    def _meta(self, engine: Engine, state: RunState) -> CheckpointMeta:
        state = replace(state, loss_scale=engine.loss_scale)
        return checkpoints.meta_of(engine, state, self._config, self._data, run=self._run)

    def _copies(self, engine: Engine) -> list[Piece]:
        """Copy this rank's state to host memory that is reused by the next save."""
        held, self._buffers = self._buffers, {}
        pieces = []
        for piece in checkpoints.live_pieces(engine, self._comm.rank):
            values = piece.values.detach()
            buffer = held.pop((piece.tensor, piece.slot, piece.box), None)
            if buffer is None or buffer.dtype != values.dtype:
                pinned = values.is_cuda
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
            buffer.copy_(values, non_blocking=True)
            self._buffers[piece.tensor, piece.slot, piece.box] = buffer
            pieces.append(Piece(piece.tensor, piece.slot, piece.box, buffer))
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        return pieces
