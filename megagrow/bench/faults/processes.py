"""The processes of a fault campaign: commands of `megagrow`, forked from one that has imported all.

An import takes longer than the small commands that are disturbed.  The fault shim is preloaded
into the process that forks, and does nothing until an attempt's own environment asks for it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megagrow.bench.jobs import rank_environment

CONTEXT = multiprocessing.get_context("forkserver")
# The second is what the first engine of a process imports, in two seconds.
_PRELOAD = ["megagrow.train.loop", "torch._dynamo", "megagrow.checkpoint.convert.run",
            "megagrow.train.grow_offline", "megagrow.bench.savings.campaign"]  # fmt: skip
_FIRST_WORDS = {"starting": 0, "comparing": 0, "step": 1, "end": 1, "validation": 2, "saving": 3,
                "growing": 4, "taking": 4}  # fmt: skip
DEFECT = 70  # exit status of a process that an error of our own ended (sysexits: EX_SOFTWARE)

CONTEXT.set_forkserver_preload(_PRELOAD)


def begin(shim: Path) -> None:
    """Start the process that forks, with the shim in it; before the first `start`."""
    from multiprocessing import forkserver

    os.environ["LD_PRELOAD"] = str(shim)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["LD_PRELOAD"]


def start(
    command: str,
    arguments: Sequence[str],
    *,
    world: int,
    log: Path,
    phases: Any = None,
    environment: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Start a command as `world` ranks of a job, or for `world` 0 as a process without a job.

    Args:
        command: of `megagrow`.
        log: takes what they print.
        phases: an array of a number a rank, which tells what the rank of a training job does.
        environment: more variables, such as the shim's.
    """
    store = None
    if world:
        # As torchrun does it: the parent holds the store, on a port that the system picks.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
    processes: list[BaseProcess] = []
    for rank in range(max(1, world)):
        more = dict(environment or {})
        if store is not None:
            more |= rank_environment(rank, world, store.port)
        process = CONTEXT.Process(
            target=_main, args=(command, list(arguments), more, rank, phases, str(log))
        )
        process.start()
        process.store = store  # type: ignore[attr-defined]  # lives as long as the process
        processes.append(process)
    return processes


def _main(
    command: str,
    arguments: list[str],
    environment: dict[str, str],
    rank: int,
    phases: Any,
    log: str,
) -> None:
    os.setsid()  # a group of its own, with whatever it starts
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    if "FAULT_CALL" in environment:
        os.environ["FAULT_LOG"] = str(
            os.open(f"{log}.calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        )
    if phases is not None:
        _tell_phases(rank, phases)
    sys.argv = ["megagrow", command, *arguments]
    try:
        runpy.run_module("megagrow", run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
        status = DEFECT
    sys.stdout.flush()
    sys.stderr.flush()
    # Past the interpreter's own end, where gloo's threads may outlive what they use.
    os._exit(status)


def _tell_phases(rank: int, phases: Any) -> None:
    from megagrow.train.health.watch import Watch

    begin = Watch.begin

    def told(self: Watch, what: str, **more: Any) -> None:
        phase = _FIRST_WORDS[what.split()[0]]
        phases[rank] = (phases[rank] // 8 + 1) * 8 + phase
        begin(self, what, **more)

    Watch.begin = told  # type: ignore[method-assign]
