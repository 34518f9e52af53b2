"""The processes of a job: start-up, small objects, and point-to-point messages."""

from __future__ import annotations

import gc
import importlib
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megagrow.cluster.environment import require_one_task
from megagrow.cluster.network import choose_gloo_interface, free_port, require_free_port
from megagrow.engine.groups import Groups, make_groups
from megagrow.engine.precision import on_gpu
from megagrow.errors import MegagrowError
from megagrow.state.layout import Layout
from megagrow.transfer.ends import Operation

_STORE_SECONDS = 10.0  # how long the store's host may take to answer


class Comm:
    """All ranks of the job; the `Channel` of transfers and the `Group` of checkpoints.

    Attributes:
        rank: this process, from 0.
        world: number of processes.
        local_rank: this process among those of its host.
        device: where this rank's model lives.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._groups: dict[tuple[int, int, int], Groups] = {}
        self.device = torch.device("cuda", self.local_rank) if on_gpu() else torch.device("cpu")

    def groups(self, layout: Layout) -> Groups:
        """The process groups of a layout; made once for each shape of the grid."""
        shape = (layout.data, layout.tensor, layout.pipeline)
        if shape not in self._groups:
            self._groups[shape] = make_groups(layout, self.rank)
        return self._groups[shape]

    def exchange(
        self, *, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> None:
        """Send one flat tensor and receive another; returns when both are done."""
        operations = []
        if send is not None:
            operations.append(dist.P2POp(dist.isend, send, to))
        if receive is not None:
            operations.append(dist.P2POp(dist.irecv, receive, source))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def reduce(self, values: torch.Tensor, *, operation: Operation) -> None:
        """Replace a tensor by the sum or the maximum of all ranks', element by element."""
        dist.all_reduce(values, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])

    def gather(self, item: Any) -> list[Any] | None:
        """A small object of every rank, on rank 0; None elsewhere."""
        items = [None] * self.world if self.rank == 0 else None
        dist.gather_object(item, items, dst=0)
        return items

    def all_gather(self, item: Any) -> list[Any]:
        """A small object of every rank, on all."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's small object, on all."""
        box = [item]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def gather_floats(self, value: float) -> list[float]:
        """One number of every rank, on all."""
        return [row[0] for row in self.gather_rows([value])]

    def gather_rows(self, values: Sequence[float]) -> list[list[float]]:
        """Some numbers of every rank, on all: a row a rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        out = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(out, mine)
        rows: list[list[float]] = torch.stack(out).tolist()
        return rows

    def store(self) -> Any:
        """The job's key-value store, by a connection of the caller's own.

        Any thread may use it, also while another waits in a collective.
        """
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        return store

    def limit_collectives(self, seconds: float) -> None:
        """Let every collective of every group fail after so long; call when groups were made."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def sum_ints(self, value: int) -> int:
        """The sum over all ranks."""
        total = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def add_up(self, values: torch.Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        dist.all_reduce(values)

    def agree(self, failure: Exception | None) -> None:
        """Raise on every rank if any rank failed, so that none waits for one that is gone.

        Raises:
            MegagrowError: the first failure, of this rank's own kind where it is its own.
        """
        failures = self.all_gather(None if failure is None else (type(failure), str(failure)))
        for rank, found in enumerate(failures):
            if found is None:
                continue
            if failure is not None and rank == self.rank:
                raise failure
            kind, text = found
            wanted = kind if issubclass(kind, MegagrowError) else MegagrowError
            raise wanted(text if kind is wanted else f"rank {rank} failed: {kind.__name__}: {text}")


def start(seconds: float = 600.0) -> Comm:
    """Join the job that a launcher started, or be a job of one process.

    Args:
        seconds: how long the other ranks may take to come, and each collective after that.

    Raises:
        MegagrowError: rank 0's port is taken, or no network leads to its host; or several tasks
            were started without a RANK.
    """
    require_one_task(os.environ)
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(free_port())})
    # Moments of rarely seen tokens decay into denormal numbers, which a CPU is slow on.
    torch.set_flush_denormal(True)
    # DeepSpeed 0.19 calls collectives by names that PyTorch 2.13 warns of at every first use.
    warnings.filterwarnings("ignore", "`torch.distributed", category=FutureWarning)
    # DeepSpeed would compile a shared-memory op that only its inference uses.  That takes a
    # minute and a lock file, and a job that is killed meanwhile leaves the lock behind: every
    # later one would wait for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not on_gpu():
        # DeepSpeed asks for fp16 instructions, which few CPUs have; PyTorch does without them.
        get_accelerator().is_fp16_supported = lambda: True
    if not dist.is_initialized():
        if on_gpu():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if on_gpu() else "gloo"
        require_free_port(os.environ)
        choose_gloo_interface(os.environ)
        deepspeed.init_distributed(
            backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=seconds),
        )
    _settle_imports()
    return Comm()


def stop() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _settle_imports() -> None:
    """Keep the half million objects of the imported libraries out of garbage collections.

    Each growth needs one, to let go of DeepSpeed's old engine, and it would take a second.
    """
    # The first engine would import this, and PyTorch's compiler with it.
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    gc.collect()
    gc.freeze()
