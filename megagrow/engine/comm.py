"""The ranks of a job: start-up, small-object collectives and point-to-point messages."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megagrow.cluster.network import choose_gloo_interface, require_free_port
from megagrow.engine.groups import Groups, make_groups
from megagrow.engine.precision import on_gpu
from megagrow.engine.store import BoundedStore
from megagrow.errors import MegagrowError
from megagrow.processes import start_up
from megagrow.state.layout import Layout
from megagrow.transfer.ends import Operation

_STORE_SECONDS = 10.0  # how long the store's host may take to answer


class Comm:
    """All ranks of the job; implements `Channel` for transfers and `Group` for checkpoints.

    Attributes:
        rank: the global rank of this process.
        world: number of processes.
        local_rank: the rank of this process on its host.
        device: where this rank's model lives.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._groups: dict[tuple[int, int, int], Groups] = {}
        self.device = torch.device("cuda", self.local_rank) if on_gpu() else torch.device("cpu")

    def groups(self, layout: Layout) -> Groups:
        """The process groups of a layout, created once for each grid shape."""
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
        """Reduce a tensor over all ranks, in place, with an elementwise sum or maximum."""
        dist.all_reduce(values, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])

    def gather(self, item: Any) -> list[Any] | None:
        """Gather a small object from every rank on rank 0; returns None elsewhere."""
        items = [None] * self.world if self.rank == 0 else None
        dist.gather_object(item, items, dst=0)
        return items

    def all_gather(self, item: Any) -> list[Any]:
        """Gather a small object from every rank on every rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """Broadcast a small object from rank 0."""
        box = [item]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def gather_floats(self, value: float) -> list[float]:
        """Gather one number from every rank on every rank."""
        return [row[0] for row in self.gather_rows([value])]

    def gather_rows(self, values: Sequence[float]) -> list[list[float]]:
        """Gather several numbers from every rank on every rank, one row per rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        out = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(out, mine)
        rows: list[list[float]] = torch.stack(out).tolist()
        return rows

    def store(self, seconds: float = _STORE_SECONDS) -> BoundedStore:
        """The job's key-value store, on a connection that belongs to the caller.

        Safe to use from any thread, even while another thread waits in a collective.

        Args:
            seconds: timeout of an operation.
        """
        from megagrow.engine.deepspeed import privates  # imports DeepSpeed, which takes seconds

        store = privates.default_store().clone()
        return BoundedStore(store, seconds)

    def limit_collectives(self, seconds: float) -> None:
        """Set a timeout for every collective of every group; call again after creating groups."""
        from megagrow.engine.deepspeed import privates  # imports DeepSpeed, which takes seconds

        privates.limit_collectives(seconds)

    def sum_ints(self, value: int) -> int:
        """Sum an integer over all ranks."""
        total = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def add_up(self, values: torch.Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        dist.all_reduce(values)

    def agree(self, failure: Exception | None) -> None:
        """Raise on every rank if any rank failed, so that no rank waits for one that has exited.

        Raises:
            MegagrowError: the first failure; on the rank that failed, its own exception type.
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
    """Join the job that the environment describes: a launcher's, or that of `job_of_one`.

    Args:
        seconds: timeout for the other ranks to join, and for each later collective.

    Raises:
        MegagrowError: rank 0's port is in use, or its host is unreachable.
    """
    # Adam moments of rare tokens decay into denormals, which are slow on a CPU.
    torch.set_flush_denormal(True)
    # DeepSpeed 0.19 calls collectives by names for which PyTorch 2.13 warns at every first use.
    warnings.filterwarnings("ignore", "`torch.distributed", category=FutureWarning)
    from megagrow.engine.deepspeed import privates  # imports DeepSpeed, which takes seconds

    start_up.ends("imports")
    privates.skip_shared_memory_op()
    if not on_gpu():
        privates.allow_fp16_on_cpu()
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
    start_up.ends("rendezvous")
    _settle_imports()
    start_up.ends("imports")
    return Comm()


def stop() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _settle_imports() -> None:
    """Exclude the half million objects of the imported libraries from garbage collection.

    Each growth runs one collection to free the old DeepSpeed engine; it would take a second.
    """
    from megagrow.engine.deepspeed import privates

    privates.import_early()
    gc.collect()
    gc.freeze()
