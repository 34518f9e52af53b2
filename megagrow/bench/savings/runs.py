"""Train the members of a savings benchmark, each leg at most once, whatever interrupts it.

Every leg is an ordinary run with a directory of its own: the stable run up to a branch point,
then the branch that decays, then the stable run further.  Finished legs are told by their logs,
so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from megagrow.bench.savings.config import Branch, Member
from megagrow.bench.savings.results import finished, read_log
from megagrow.checkpoint import list_steps, step_path
from megagrow.config import Config
from megagrow.data.dataset import open_dataset
from megagrow.engine.comm import Comm, start, stop
from megagrow.errors import TrainingError
from megagrow.train.checkpoints import DIRECTORY
from megagrow.train.holding import holding_run
from megagrow.train.loop import Trainer
from megagrow.train.plan import plan_run, with_vocabulary

Task = tuple[Member, tuple[Branch, ...]]


def run_all(tasks: Sequence[Task], *, comm: Comm | None, workers: int, until: float | None) -> bool:
    """Train members up to their last branch.

    Args:
        tasks: members and their branches, the most wanted first.
        comm: the launcher's processes, which train together; None starts `workers` processes
            that train a member each.
        workers: processes to start.
        until: time (seconds since 1970) after which no leg begins; None is never.

    Returns:
        Whether all of them are finished.

    Raises:
        MegagrowError: of the first run that failed; the others' finished legs stay.
    """
    left = [task for task in tasks if not all(finished(task[0], b) for b in task[1])]
    if comm is not None:
        # Rank 0's view of the disk counts, or ranks could part ways.
        return all(run_member(*task, comm=comm, until=until) for task in comm.broadcast(left))
    if not left or (until is not None and time.time() > until):
        return not left
    context = multiprocessing.get_context("spawn")
    count = min(workers, len(left))
    threads = max(1, (os.cpu_count() or 1) // count)
    pool = ProcessPoolExecutor(count, context, initializer=_prepare, initargs=(threads,))
    try:
        waiting: set[Future[bool]] = {pool.submit(_alone, *task, until) for task in left}
        complete = True
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                complete &= future.result()
        return complete
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process that trains was killed or could not start",
            expected="memory for each of them",
            mend="start it again with fewer --workers: finished legs are kept",
        ) from error
    finally:
        # A failure or an interruption: what is running ends with its worker, and is resumed later.
        for process in list((pool._processes or {}).values()):
            if any(not future.done() for future in waiting):
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _prepare(threads: int) -> None:
    """A worker is a job of one process."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _alone(member: Member, branches: tuple[Branch, ...], until: float | None) -> bool:
    return run_member(member, branches, comm=start(), until=until)


def run_member(
    member: Member, branches: Sequence[Branch], *, comm: Comm, until: float | None
) -> bool:
    """Train one member; all ranks call together.  Returns whether it came to its end."""
    longest = branches[-1].start
    for branch in branches:
        if comm.broadcast(finished(member, branch)):
            continue
        if comm.broadcast(until is not None and time.time() > until):
            return False
        trunk = member.trunk(longest, stop=branch.start)
        run = member.branch(branch)
        root, here = Path(trunk.run.dir) / DIRECTORY, Path(run.run.dir) / DIRECTORY
        at = step_path(root, branch.start)
        if not comm.broadcast(at.exists()):
            passed = comm.broadcast([step for step in list_steps(root) if step > branch.start])
            if passed:
                raise TrainingError(
                    f"{trunk.run.dir}: is past the branch for a budget of {branch.budget:.3g}",
                    found=f"step {passed[0]}",
                    expected=f"step {branch.start}, or one before",
                    mend=f"remove {member.directory} to train it again with this budget",
                )
            _train(trunk, comm=comm, log=member.directory / "log.txt", resume="auto")
        begun = comm.broadcast(bool(list_steps(here)))
        resume = "auto" if begun else str(at)
        _train(run, comm=comm, log=member.directory / "log.txt", resume=resume)
    return True


def _train(config: Config, *, comm: Comm, log: Path, resume: str) -> None:
    data = open_dataset(config.data.path, config.data.tokenizer)
    config = with_vocabulary(config, data.vocab_size)
    plan = plan_run(config, world=comm.world, vocabulary=data.vocab_size)
    with _spoken_into(log if comm.rank == 0 else None), holding_run(config, comm) as lock:
        trainer = Trainer(config=config, plan=plan, data=data, comm=comm, resume=resume, lock=lock)
        trainer.run()
        trainer.engine.close()


@contextlib.contextmanager
def _spoken_into(log: Path | None) -> Iterator[None]:
    """What a run says goes to its member's log: several speak at once."""
    if log is None:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "a", encoding="utf-8", buffering=1) as stream,
        contextlib.redirect_stderr(stream),
        contextlib.redirect_stdout(stream),
    ):
        yield


__all__ = ["Task", "read_log", "run_all", "run_member", "start", "stop"]
