"""A run's checkpoints in an object store (`checkpoint.remote`).

Checkpoints are saved in the run directory; rank 0 then uploads each in a thread beside the next
steps, from the committed files.  If several are committed during one upload, the newest of them is
next.  A failed upload is reported, and the run goes on: the next save is uploaded, which is the
retry.  A run ends only when its last checkpoint is there.

A start takes the newest checkpoint of both places: if the store's is newer, rank 0 downloads it
into the run directory, where all ranks then read it as any other.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megagrow.background import Task
from megagrow.checkpoint import list_steps, step_path
from megagrow.checkpoint.io.object_store import below
from megagrow.checkpoint.native.remote import RemoteSteps
from megagrow.checkpoint.native.steps import step_of
from megagrow.config import Config
from megagrow.engine.comm import Comm
from megagrow.errors import CheckpointError, MegagrowError
from megagrow.files import is_url, write_atomically
from megagrow.train.checkpoints import DIRECTORY, RUN
from megagrow.train.health.agree import on_first
from megagrow.train.health.run_lock import RUN_ID, RunLock

T = TypeVar("T")

FETCHED = "fetched"  # checkpoints of other runs, which this one starts from
LOOK_SECONDS = 5.0  # between two looks at work that all ranks wait for


class Uploads:
    """Uploads checkpoints one at a time; used on rank 0.

    Args:
        url: `checkpoint.remote`; without it nothing is done.
        keep: number of checkpoints kept there.
        lock: of run.dir, without which nothing is uploaded or deleted.
        say: called with what a user should know.
        event: writes a line to the run's log.
    """

    def __init__(
        self,
        url: str | None,
        *,
        keep: int,
        lock: RunLock,
        say: Callable[[str], None],
        event: Callable[..., None],
    ) -> None:
        self._remote = None if url is None else RemoteSteps(url)
        self._keep, self._lock, self._say, self._event = keep, lock, say, event
        self._task: Task[tuple[int, float]] | None = None
        self._path: Path | None = None  # being uploaded
        self._next: Path | None = None

    def begin(self, path: Path) -> None:
        """Upload a committed checkpoint as soon as the upload in progress has ended."""
        if self._remote is not None and path != self._path:
            self._next = path
            self.poll()

    def poll(self) -> MegagrowError | None:
        """Note an upload that has ended, and start the next; returns why it failed, if it did."""
        failure = None
        if self._task is not None and self._task.done():
            failure = self._conclude(self._task)
            self._task = None
        if self._task is None and self._next is not None:
            self._path, self._next = self._next, None
            path = self._path
            self._task = Task("upload", lambda: self._upload(path))
        return failure

    def finish(self, seconds: float) -> bool:
        """Wait for all uploads, but not longer than that; returns whether they have ended.

        Raises:
            CheckpointError: the last one failed.
        """
        if self._task is not None:
            self._task.wait(seconds)
        failure = self.poll()
        if failure is not None and self._task is None:
            raise failure
        return self._task is None

    def _conclude(self, task: Task[tuple[int, float]]) -> MegagrowError | None:
        assert self._path is not None
        step = step_of(self._path)
        try:
            count, seconds = task.result()
        except MegagrowError as error:
            self._path = None  # to be tried again if it is still the newest
            self._event("upload_failed", step=step, why=str(error))
            self._say(
                f"warning: step {step} is not in checkpoint.remote: {error}\nThe run continues, "
                "and the checkpoint is in the run directory; the next save is uploaded as usual."
            )
            return error
        self._event("upload", step=step, bytes=count, upload_seconds=seconds)
        return None

    def _upload(self, path: Path) -> tuple[int, float]:
        assert self._remote is not None
        begin = time.perf_counter()
        count = self._remote.upload(path, go_on=self._lock.require)
        seconds = time.perf_counter() - begin
        self._lock.require()
        self._remote.retire(self._keep)
        return count, seconds


def require_store(config: Config) -> None:
    """Try out `checkpoint.remote`, if there is one.

    Raises:
        CheckpointError: the run could not write to it, or another run's checkpoints are there.
    """
    if config.checkpoint.remote is None:
        return
    remote = RemoteSteps(config.checkpoint.remote)
    remote.store.try_out()
    steps, own = remote.steps(), Path(config.run.dir) / RUN_ID
    if not steps or not own.exists():
        return
    theirs = remote.manifest(steps[-1]).fingerprints.get(RUN)
    mine = own.read_text(encoding="utf-8").strip()
    if theirs not in (None, mine):
        raise CheckpointError(
            f"checkpoint.remote = {remote.store.url}: holds checkpoints of another run",
            found=f"step {steps[-1]} of run {theirs}",
            expected=f"those of run {mine}, as in {own.parent}",
            fix="set checkpoint.remote to a URL of this run's own",
        )


def bring(config: Config, resume: str, *, say: Callable[[str], None]) -> str:
    """Download what a run is to resume from, if it is newer in the object store, or named by a URL.

    Args:
        resume: as for `Trainer`.
        say: called with what is downloaded.

    Returns:
        What to resume from, now without a URL.

    Raises:
        CheckpointError: there is none, it is damaged or not of this run.
    """
    root, url = Path(config.run.dir) / DIRECTORY, config.checkpoint.remote
    if is_url(resume):
        return str(_named(resume, root, url, say=say))
    if url is None or resume not in ("auto", "good", "never"):
        return resume
    remote, held = RemoteSteps(url), list_steps(root)
    newer = [step for step in remote.steps() if not held or step > held[-1]]
    if newer and resume == "never":
        raise CheckpointError(
            f"--resume never, but checkpoint.remote = {url} already holds checkpoints",
            found=f"steps {', '.join(map(str, newer))}",
            fix="resume with --resume auto, or set checkpoint.remote to another URL",
        )
    for step in reversed(newer):
        try:
            _fetch(remote, step, root, say=say)
            break
        except CheckpointError as error:
            if resume != "good":
                raise
            say(f"warning: {error}\nThe one before it is tried (--resume good).")
    return resume


def _named(resume: str, root: Path, own: str | None, *, say: Callable[[str], None]) -> Path:
    """The local copy of the checkpoint of a URL: among the run's own, if it is one of them."""
    parent, _, name = resume.rstrip("/").rpartition("/")
    step = step_of(Path(name))
    remote = RemoteSteps(resume if step is None else parent)
    if step is None:
        steps = remote.steps()
        if not steps:
            raise CheckpointError(
                f"--resume {resume}: no checkpoint there",
                expected="a URL of a checkpoint, or of a directory with step_<step>",
            )
        step = steps[-1]
    mine = own is not None and below(remote.store.url, own) and below(own, remote.store.url)
    place = root if mine else root.parent / FETCHED / _digest(remote.store.url)
    path = step_path(place, step)
    if path.exists():
        return path
    return _fetch(remote, step, place, say=say, identify=mine)


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:8]


def _fetch(
    remote: RemoteSteps,
    step: int,
    root: Path,
    *,
    say: Callable[[str], None],
    identify: bool = True,
) -> Path:
    run = remote.manifest(step).fingerprints.get(RUN)
    begin = time.perf_counter()
    path = remote.fetch(step, root)
    seconds = time.perf_counter() - begin
    say(f"fetched {remote.store.url}/{path.name} in {seconds:.1f} s; every checksum is correct")
    known = root.parent / RUN_ID
    if identify and run is not None and not known.exists():
        write_atomically(known, f"{run}\n".encode())  # the run goes on, on another disk
    return path


def set_aside(config: Config, after_step: int) -> list[str]:
    """Set aside the copies of checkpoints newer than a step, when a run goes back to that step.

    Raises:
        CheckpointError: the object store failed.
    """
    url = config.checkpoint.remote
    return [] if url is None else RemoteSteps(url).set_aside(after_step)


def on_first_beating(comm: Comm, begin: Callable[[], Any], work: Callable[[], T]) -> T:
    """As `on_first`, for work that may take longer than a rank may be silent.

    Args:
        begin: called on all ranks every few seconds.
    """
    tasks = [Task("store", work)] if comm.rank == 0 else []
    while not on_first(comm, lambda: tasks[0].wait(LOOK_SECONDS)):
        begin()
    return on_first(comm, lambda: tasks[0].result())
