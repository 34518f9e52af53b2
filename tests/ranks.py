"""Real jobs of several processes inside a test: `run_ranks(4, function, ...)`.

A fork server imports PyTorch and DeepSpeed once for a test session; every call then forks
processes that have joined no job yet, so nothing of one test reaches the next.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

_CONTEXT = multiprocessing.get_context("forkserver")
# The last two are what the first engine of a process would import, in two seconds.
_CONTEXT.set_forkserver_preload(
    ["__main__", "deepspeed", "hypothesis", "pytest", "torch", "torch._dynamo",
     "deepspeed.runtime.zero.muon.original_muon"]
)  # fmt: skip
_GRACE_SECONDS = 1.5  # for the other ranks' errors to arrive after the first
_STACKS = signal.SIGRTMIN + 5  # a rank that gets it writes the stacks of its threads


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240.0,
    device: str = "cpu",
) -> list[Any]:
    """Run `function(comm, *args)` on every rank of a job; returns the results by rank.

    The job talks by gloo on the CPU, by NCCL on a GPU (`device` "cuda", one rank a GPU).

    The function is a module-level one; it, its arguments and its result are pickled.
    A rank that fails or hangs fails the test with its number and traceback, and ends the job.
    """
    # As torchrun does it: the parent holds the store, on a port that the system picks.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    work = pickle.dumps((function, args))
    ours: list[Connection] = []
    processes: list[ForkServerProcess] = []
    stacks = tempfile.TemporaryDirectory(prefix="stacks")
    for rank in range(world):
        mine, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_rank_main,
            args=(rank, world, store.port, theirs, work, device, stacks.name),
            daemon=True,
        )
        process.start()
        theirs.close()
        ours.append(mine)
        processes.append(process)
    patience = 0.0
    try:
        answers, silent = _collect(ours, timeout)
        if silent:
            said = f"no answer from ranks {silent} within {timeout:g} s"
            raise AssertionError("\n".join([said, *_why(answers, silent, processes, stacks.name)]))
        patience = _GRACE_SECONDS
        return [answers[rank] for rank in range(world)]
    finally:
        # A rank leaves when its pipe closes, hence not while another still talks to it.
        for mine in ours:
            mine.close()
        for process in processes:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()
        stacks.cleanup()


def _why(
    answers: dict[int, Any], silent: list[int], processes: Sequence[ForkServerProcess], stacks: str
) -> Iterator[str]:
    """What the ranks that answered said, and where the silent ones stand."""
    for rank, answer in sorted(answers.items()):
        yield f"rank {rank} answered: {str(answer)[-4000:]}"
    for rank in silent:
        with contextlib.suppress(ProcessLookupError):
            pid = processes[rank].pid
            assert pid is not None  # it was started
            os.kill(pid, _STACKS)
    time.sleep(_GRACE_SECONDS)
    for rank in silent:
        file = Path(stacks, str(rank))
        yield f"rank {rank} stands at:\n{file.read_text() if file.exists() else '(not begun)'}"


def _collect(pipes: Sequence[Connection], timeout: float) -> tuple[dict[int, Any], list[int]]:
    """The answers by rank, and the ranks that gave none in time."""
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(errors) < len(pipes):
        missing = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in (results | errors)}
        ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = missing[pipe]
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, "the process ended without a word"
            (results if good else errors)[rank] = value
        if errors:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if errors:
        raise AssertionError("\n".join(f"rank {r} failed:\n{e}" for r, e in sorted(errors.items())))
    return results, [rank for rank in range(len(pipes)) if rank not in results]


def _rank_main(
    rank: int, world: int, port: int, pipe: Connection, work: bytes, device: str, stacks: str
) -> None:
    file = Path(stacks, str(rank)).open("w")  # noqa: SIM115 - it stays open for the handler
    faulthandler.register(_STACKS, file=file, all_threads=True)
    os.environ.update(
        DS_ACCELERATOR=device,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_ATTEMPT="0",
    )
    leaving = threading.Thread(target=_leave_with_parent, args=(pipe,), daemon=True)
    leaving.start()
    try:
        import torch
        from deepspeed.accelerator import real_accelerator

        real_accelerator.ds_accelerator = None  # the fork server's choice, by its environment
        from megagrow.engine.comm import start

        torch.set_num_threads(1)
        function, args = pickle.loads(work)
        answer = True, function(start(), *args)
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    leaving.join()


def _leave_with_parent(pipe: Connection) -> None:
    """End this process when the parent closes the pipe, or is killed; even inside a collective."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()
    # Past the interpreter's own end, where gloo's threads may outlive what they use.
    os._exit(0)
