"""Train the members of a savings benchmark, each leg at most once, despite interruptions.

Every leg is an ordinary run with its own directory: the stable run up to a branch point,
then the branch that decays, then the stable run further.  Finished legs are recognised by their
logs, so the same command continues where it was stopped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.background import be_a_worker
from megagrow.checkpoint import list_steps, step_path
from megagrow.cluster.environment import job_of_one
from megagrow.config import Config
from megagrow.data.run_data import open_data
from megagrow.engine.comm import Comm, start
from megagrow.errors import TrainingError
from megagrow.savings.members import Branch, Member
from megagrow.savings.results import begun_at, diverged, finished, is_done
from megagrow.train.checkpoints import DIRECTORY
from megagrow.train.health.run_lock import holding_run
from megagrow.train.loop import Trainer
from megagrow.train.run_plan import plan_run, with_vocabulary


@dataclass(frozen=True)
class MemberTask:
    """A member's runs that must be trained in sequence.

    Attributes:
        member: the member.
        branches: all branches of its stable run up to the last wanted one; each one's state is
        kept. wanted: those that decay.
        longest: number of steps of the stable run up to the last possible branch.
        keep: whether to keep states that no branch known to be wanted needs.
    """

    member: Member
    branches: tuple[Branch, ...]
    wanted: tuple[Branch, ...]
    longest: int
    keep: bool = True


def run_all(
    missing: Callable[[], Sequence[MemberTask]],
    *,
    comm: Comm | None,
    jobs: int,
    until: float | None,
) -> bool:
    """Train until nothing is missing.

    Args:
        missing: returns what can be trained and is not, the most important first; called again
            whenever something is finished.
        comm: the launcher's processes, which train together; None starts `jobs` processes
            that train one member each.
        jobs: number of members trained in parallel.
        until: time (seconds since 1970) after which no leg is started; None is never.

    Returns:
        Whether everything is finished.

    Raises:
        MegagrowError: of the first run that failed; the others' finished legs are kept.
    """
    if comm is not None:
        # Only rank 0's view of the disk counts, or ranks could diverge.
        while tasks := comm.broadcast(missing() if comm.rank == 0 else []):
            if not run_member(tasks[0], comm=comm, until=until):
                return False
        return True
    if not missing() or _is_over(until):
        return not missing()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_prepare, initargs=(threads,))
    running: dict[Future[bool], Path] = {}
    try:
        while True:
            tasks = [] if _is_over(until) else missing()
            for task in tasks:
                if len(running) < jobs and task.member.directory not in running.values():
                    with _ignoring_interrupts():
                        running[pool.submit(_alone, task, until)] = task.member.directory
            if not running:
                return not missing()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process that trains was killed or could not start",
            expected="memory for each of them",
            fix="start it again with fewer --jobs: finished legs are kept",
        ) from error
    finally:
        # After a failure or an interruption, running legs end with their workers and are resumed
        # later.
        for process in list((pool._processes or {}).values()):
            if any(not future.done() for future in running):
                process.terminate()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from the start; the parent terminates them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_over(until: float | None) -> bool:
    return until is not None and time.time() > until


def _prepare(threads: int) -> None:
    """Make a worker a job of one process; it trains one member after another."""
    be_a_worker()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@job_of_one()
def _alone(task: MemberTask, until: float | None) -> bool:
    return run_member(task, comm=start(), until=until)


def run_member(task: MemberTask, *, comm: Comm, until: float | None) -> bool:
    """Train one member; all ranks call together.  Returns whether it is finished."""
    member, log = task.member, task.member.directory / "log.txt"
    stable = member.directory / "stable"
    for branch in task.branches:
        wanted = branch in task.wanted and not comm.broadcast(is_done(member, branch))
        at, newest = comm.broadcast((_state(member, branch), _newest(stable)))
        if not wanted and newest >= branch.start:
            continue
        if comm.broadcast(_is_over(until)):
            return False
        if at is None:
            run = member.trunk(task.longest, stop=branch.start)
            if newest > branch.start or (newest == 0 and comm.broadcast(_has_ended(task))):
                # A budget added after its state was deleted: that part is trained again.
                run = _elsewhere(run, member.directory / f"stable_{branch.start}")
            _train(run, comm=comm, log=log, resume="auto")
            at = comm.broadcast(_state(member, branch))
            if at is None:  # it diverged, and so do all later branches
                break
        if wanted:
            _decay(task.member, branch, at, comm=comm, log=log)
    if comm.rank == 0 and not task.keep:
        for place in member.directory.glob("stable*"):
            shutil.rmtree(place / DIRECTORY, ignore_errors=True)
    return True


def _decay(member: Member, branch: Branch, at: Path, *, comm: Comm, log: Path) -> None:
    here = member.place(branch) / DIRECTORY
    if comm.rank == 0 and (
        finished(here.parent, branch.end) or begun_at(here.parent) not in (None, branch.start)
    ):
        shutil.rmtree(here.parent)  # its decay or its average is not the wanted one
    begun = comm.broadcast(bool(list_steps(here)))
    _train(member.branch(branch), comm=comm, log=log, resume="auto" if begun else str(at))
    if comm.rank == 0 and is_done(member, branch):  # nothing resumes from its end
        shutil.rmtree(here, ignore_errors=True)


def _state(member: Member, branch: Branch) -> Path | None:
    """The state from which a branch starts, if it is kept."""
    path = step_path(member.stable(branch) / DIRECTORY, branch.start)
    return path if path.exists() else None


def _has_ended(task: MemberTask) -> bool:
    """Whether a branch was finished; there was a state then, whether or not it is kept."""
    return any(finished(task.member.place(branch), branch.end) for branch in task.branches)


def _newest(stable: Path) -> int:
    """The last step that a stable run is known to have reached."""
    return max(list_steps(stable / DIRECTORY), default=0)


def _elsewhere(config: Config, directory: Path) -> Config:
    run = config.run.model_copy(update={"dir": str(directory)})
    return config.model_copy(update={"run": run})


def _train(config: Config, *, comm: Comm, log: Path, resume: str) -> None:
    """Train one run to its end, or until its log ends with non-finite numbers."""
    data = open_data(config)
    config = with_vocabulary(config, data.vocab_size)
    plan = plan_run(config, world=comm.world, vocabulary=data.vocab_size)
    with _spoken_into(log if comm.rank == 0 else None), holding_run(config, comm) as lock:
        trainer = Trainer(config=config, plan=plan, data=data, comm=comm, resume=resume, lock=lock)
        try:
            trainer.run()
        except TrainingError:
            trainer.journal.close()
            if not comm.broadcast(diverged(Path(config.run.dir))):
                raise
        trainer.engine.close()


@contextlib.contextmanager
def _spoken_into(log: Path | None) -> Iterator[None]:
    """Redirect a run's output to its member's log, since several run at once."""
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
