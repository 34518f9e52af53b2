"""The processes of a fault campaign: `megagrow` commands, forked from a preloaded process.

Imports take longer than the small commands being tested.  The fault shim is preloaded into the
forking process, and does nothing until an attempt's environment enables it.
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

from megagrow.savings.jobs import rank_environment

CONTEXT = multiprocessing.get_context("forkserver")
# The second is imported by the first engine of a process and takes two seconds.
_PRELOAD = ["megagrow.train.loop", "torch._dynamo", "megagrow.checkpoint.convert.run",
            "megagrow.train.grow_offline", "megagrow.savings.campaign"]  # fmt: skip
_FIRST_WORDS = {"starting": 0, "comparing": 0, "step": 1, "end": 1, "validation": 2, "saving": 3,
                "growing": 4, "taking": 4}  # fmt: skip
DEFECT = 70  # exit status of a process that died of an unexpected exception (sysexits: EX_SOFTWARE)

CONTEXT.set_forkserver_preload(_PRELOAD)


def begin(shim: Path) -> None:
    """Start the forking process with the shim loaded; one that runs without it is replaced."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # there is no public way
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
    """Start a command as `world` ranks of a job, or if `world` is 0 as a process without a job.

    Args:
        command: the `megagrow` command.
        log: receives their output.
        phases: an array with one number per rank: the current phase of a training rank.
        environment: additional variables, such as the shim's.
    """
    store = None
    if world:
        # As in torchrun: the parent holds the store, on a port that the system picks.
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
        process.store = store  # type: ignore[attr-defined]  # lives as long as it
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
    os.setsid()  # its own process group, including its children
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
    # Skip the interpreter's shutdown, where gloo's threads may outlive what they use.
    os._exit(status)


def _tell_phases(rank: int, phases: Any) -> None:
    from megagrow.train.health.watch import Watch

    begin = Watch.begin

    def told(self: Watch, what: str, **more: Any) -> None:
        phase = _FIRST_WORDS[what.split()[0]]
        phases[rank] = (phases[rank] // 8 + 1) * 8 + phase
        begin(self, what, **more)

    Watch.begin = told  # type: ignore[method-assign]
