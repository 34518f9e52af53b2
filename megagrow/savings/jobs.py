"""Start the processes of a benchmark, or join those that a launcher has started."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from megagrow.errors import ConfigError
from megagrow.processes import leave


def under_launcher() -> bool:
    """Whether torchrun or the deepspeed launcher started this process."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process prints the output."""
    return os.environ.get("RANK", "0") == "0"


def run_job(world: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(comm, *args)` on every rank of a job; returns rank 0's result, None elsewhere.

    Uses the launcher's processes if there are any, else starts new ones for this call alone.
    The function must be module-level; it, its arguments and its result are pickled.

    Raises:
        ConfigError: the launcher started a different number of processes.
    """
    if under_launcher():
        return _join(world, function, args)
    # As in torchrun: the parent holds the store, on a port that the system picks.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    results: SimpleQueue[Any] = multiprocessing.get_context("spawn").SimpleQueue()
    # Fewer threads per rank than cores, or the ranks compete for the cores.
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // world)))
    work = pickle.dumps((function, args))
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        _rank_main, (world, store.port, threads, work, results), nprocs=world
    )
    return results.get()


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank on this host whose parent holds the store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_ATTEMPT": "0",
    }


def _join(world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from megagrow.engine.comm import start

    comm = start()
    if comm.world != world:
        raise ConfigError(
            "--ranks: the launcher started another number of processes",
            found=f"--ranks {world}, {comm.world} processes",
            fix="give the launcher as many processes, or start without a launcher",
        )
    result = function(comm, *args)
    return result if comm.rank == 0 else None


def _rank_main(
    rank: int, world: int, port: int, threads: int, work: bytes, results: SimpleQueue[Any]
) -> None:
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(rank_environment(rank, world, port))
    # So that DeepSpeed finds ninja even if the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    torch.set_num_threads(threads)
    from megagrow.engine.comm import start, stop

    function, args = pickle.loads(work)
    result = function(start(), *args)
    if rank == 0:
        results.put(result)
    stop()
    leave(0)
