"""One job at a time in a directory: locks that work across hosts and do not outlive their job.

A lock is a small file that names its holder, created by link(2), which is atomic on NFS as well.
While it is held, a thread refreshes the file's time. The file of a holder that was killed stays
behind and is recognised as stale:

- on the machine where the process ran, because the process is gone or its PID was reused;
- elsewhere, because the file has not been refreshed for `SILENT` seconds, by the clock of the file
  system, the only one that both machines share.

Removing the file takes the lock from its holder, which notices and must stop: see `lost`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megagrow.background import Loop
from megagrow.errors import LockError
from megagrow.processes import HIDDEN, machine, started

NAME = "run.lock"  # in a run's directory
BEAT = 5.0  # seconds between two refreshes
SILENT = 60.0  # seconds without a refresh after which a holder on another machine counts as gone
_POLL = 0.25


@dataclass(frozen=True)
class LockHolder:
    """The holder of a lock, as recorded in its file.

    Attributes:
        host, pid: the process, for people.
        machine: equal where a PID means the same process.
        started: start time of the process, in system ticks.
        since: when it took the lock, in seconds since 1970 of its own clock.
        command: what it was started as.
        token: unique to this lock.
    """

    host: str
    pid: int
    machine: str
    started: int
    since: float
    command: str
    token: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}: {self.command}"

    @staticmethod
    def me() -> LockHolder:
        """This process, with a new token."""
        return LockHolder(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=machine(),
            started=started(os.getpid()) or 0,
            since=time.time(),
            command=shlex.join(sys.orig_argv)[:2000],
            token=secrets.token_hex(8),
        )


@dataclass(frozen=True)
class _Found:
    """The current state of a lock file; `holder` is None if it is foreign or partially written.

    Attributes:
        age: seconds since it was refreshed, by the clock of its file system.
    """

    holder: LockHolder | None
    age: float

    @property
    def gone(self) -> str:
        """Why its holder no longer holds it, or ""."""
        if self.holder is not None and self.holder.machine == machine():
            same = started(self.holder.pid) in (self.holder.started, HIDDEN)
            return "" if same else "that process is gone"
        return f"no refresh for {self.age:.0f} s" if self.age > SILENT else ""


class Lock:
    """A lock that this process holds, refreshed until it is released.

    Args:
        path: of the lock's file.
        mine: its content.
        on_lost: called in the lock's thread when it finds that the lock is lost.
    """

    def __init__(
        self, path: Path, mine: LockHolder, on_lost: Callable[[], object] = lambda: None
    ) -> None:
        self.path, self._mine, self._on_lost = path, mine, on_lost
        self._lost = ""
        self._loop = Loop(f"lock {path}", self._beat, every=BEAT)
        self._loop.start()

    def lost(self) -> str:
        """How the lock was lost, or "" if it is held; reads the file."""
        if not self._lost:
            try:
                found = _holder(self.path)
            except (FileNotFoundError, NotADirectoryError):
                there = self.path.parent.is_dir()
                self._lost = f"{self.path if there else self.path.parent} was removed or renamed"
            except OSError:
                pass  # unknown for now; the thread reports it and checks again
            else:
                if found is None or found.token != self._mine.token:
                    self._lost = f"{self.path} was taken over by {found or 'an unknown job'}"
        return self._lost

    def require(self) -> None:
        """Raise if the lock was lost.

        Raises:
            LockError: it was lost.
        """
        if self.lost():
            raise LockError(
                f"{self.path.parent}: this job lost its lock and stops",
                found=self._lost,
                expected=f"the lock of {self._mine}",
                fix="start it again once no other job writes there; what was saved before is "
                "as it was, unless it was removed",
            )

    def release(self) -> None:
        """Release it; a lock that another job has taken over is left alone."""
        self._loop.stop()
        with contextlib.suppress(FileNotFoundError):
            _remove_own(self.path, self._mine)

    def _beat(self) -> bool:
        """Refresh it; returns True, which ends the thread, once it is lost."""
        if self.lost():
            _say(f"warning: {self._lost}; this job stops writing")
            self._on_lost()
            return True
        # Without explicit times: the file system's clock, not this machine's.
        with contextlib.suppress(FileNotFoundError):  # detected at the next check
            os.utime(self.path)
        return False


def beside(output: Path) -> Path:
    """The lock of an output that is replaced as a whole or does not exist yet."""
    whole = output.absolute()
    return whole.with_name(f".{whole.name}.lock")


@contextlib.contextmanager
def holding_output(output: Path) -> Iterator[Lock]:
    """Context manager: hold the lock of a command's output; main thread only.

    The block is interrupted if the lock is lost.

    Raises:
        LockError: another job holds it, or took it over; or a run that trains has this directory.
    """
    whole = output.absolute()
    runs = [place / NAME for place in (whole, *list(whole.parents)[:2])]
    lock = acquire(beside(output), of=str(output), runs=runs, on_lost=_interrupt)
    try:
        yield lock
    except BaseException:
        lock.require()
        raise
    finally:
        lock.release()


def _interrupt() -> None:
    """Interrupt the main thread and end this process's children."""
    for child in multiprocessing.active_children():
        child.terminate()
    # A shell starts what it puts in the background with SIGINT ignored.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def acquire(
    path: Path,
    *,
    of: str,
    wait: float = 0.0,
    elsewhere: str = "choose another directory",
    runs: Sequence[Path] = (),
    say: Callable[[str], object] = _say,
    on_lost: Callable[[], object] = lambda: None,
) -> Lock:
    """Take a lock; the caller releases it.

    Args:
        path: the lock file; parent directories are created.
        of: a description of what it locks, for messages.
        wait: seconds to wait for another holder to end. If it may be dead, at least the time needed
            to be certain.
        elsewhere: how to write somewhere else, for messages.
        runs: locks of the runs that may contain the path; nobody may hold them.
        say: called with a message when waiting, or when taking over a stale lock.
        on_lost: see `Lock`.

    Raises:
        LockError: another job holds it, or the file system refuses.
    """
    mine = LockHolder.me()
    ready = path.with_name(f"{path.name}.{mine.token}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            ready.write_text(json.dumps(asdict(mine)) + "\n", encoding="utf-8")
            _refuse_runs(runs, ready, of=of)
            _take(path, ready, of=of, wait=wait, say=say)
            _sweep(path, ready)
        finally:
            ready.unlink(missing_ok=True)
        return Lock(path, mine, on_lost)
    except BaseException as error:
        # Also a Ctrl-C right after it was taken: the caller has no lock to release.
        with contextlib.suppress(OSError):
            _remove_own(path, mine)
        if not isinstance(error, OSError):
            raise
        raise LockError(
            f"{of}: cannot be written",
            found=f"{error.filename or path}: {error.strerror or error}",
            expected="a directory, or a name that is free, on a disk with space",
            fix=f"{elsewhere}, or free space",
        ) from error


def _take(path: Path, ready: Path, *, of: str, wait: float, say: Callable[[str], object]) -> None:
    """Move the file `ready` to its place, waiting for another holder if necessary."""
    begun, waits = time.monotonic(), False
    while not _put(ready, path):
        try:
            found = _look(path, ready)
        except FileNotFoundError:
            continue  # it has just been released
        if found.gone:
            if _take_over(path, found, ready):
                say(f"{of}: a lock is taken over from a job that has ended ({found.gone}): "
                    f"{found.holder or 'it left no name'}")  # fmt: skip
                return
        else:
            limit = wait
            if found.age > 3 * BEAT and _elsewhere(found):
                limit = max(wait, SILENT + 2 * BEAT)  # by then it is certain
            if time.monotonic() - begun > limit:
                raise _held(path, found, of=of)
            if not waits:
                say(f"{of}: another job has it ({found.holder}); waiting up to {limit:g} s")
            waits = True
        time.sleep(_POLL)


def _refuse_runs(runs: Sequence[Path], ready: Path, *, of: str) -> None:
    for run in runs:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = _look(run, ready)
            if not found.gone:
                raise _held(run, found, of=f"the run {run.parent}, which {of} belongs to")


def _held(path: Path, found: _Found, *, of: str) -> LockError:
    return LockError(
        f"{of}: another job is writing there",
        found=f"{found.holder or 'a lock without a name'}; its last sign of life was "
        f"{found.age:.0f} s ago",
        expected="one job at a time",
        fix="wait for that job to end, or end it; if it is sure to be gone, or shall stop, take "
        f"over: rm {shlex.quote(str(path))}",
    )


def _elsewhere(found: _Found) -> bool:
    return found.holder is None or found.holder.machine != machine()


# --- files --------------------------------------------------------------------------------


def _put(ready: Path, path: Path) -> bool:
    """Link a complete file to its final name, unless that exists."""
    try:
        os.link(ready, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # perhaps a file system without links
        return _copy(ready, path)


def _copy(ready: Path, path: Path) -> bool:
    content = ready.read_bytes()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, content)
        return True
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _take_over(path: Path, found: _Found, ready: Path) -> bool:
    """Replace a stale holder by this one; False if another process was faster."""
    stale = found.holder.token if found.holder is not None else "unknown"
    claim = path.with_name(f"{path.name}.{stale}.taken")
    # Of all processes that see the same stale lock, only one may replace it.
    if not _put(ready, claim):
        with contextlib.suppress(FileNotFoundError):
            if _look(claim, ready).gone:  # its process died doing so
                claim.unlink()
        return False
    try:
        now = _look(path, ready)
        if not now.gone or now.holder != found.holder:
            return False
        os.replace(ready, path)
        return True
    except FileNotFoundError:
        return False
    finally:
        claim.unlink(missing_ok=True)


def _remove_own(path: Path, mine: LockHolder) -> None:
    """Remove a lock file, unless it is another holder's (OSError)."""
    found = _holder(path)
    if found is not None and found.token == mine.token:
        path.unlink()


def _sweep(path: Path, ready: Path) -> None:
    """Delete files left behind by processes that were killed while taking this lock."""
    for left in path.parent.iterdir():
        if left.name.startswith(f"{path.name}.") and left != ready:
            with contextlib.suppress(FileNotFoundError):
                if _look(left, path).gone:
                    left.unlink()


def _look(path: Path, probe: Path) -> _Found:
    """The current state of a lock file (FileNotFoundError if there is none).

    Args:
        probe: a file of this process, used to read the file system's clock.
    """
    with open(path, "rb") as stream:  # open() makes NFS fetch the current times from the server
        refreshed, holder = os.fstat(stream.fileno()).st_mtime, _parsed(stream.read(1 << 16))
    os.utime(probe)  # without times: the file system's own
    return _Found(holder, max(0.0, probe.stat().st_mtime - refreshed))


def _holder(path: Path) -> LockHolder | None:
    return _parsed(path.read_bytes()[: 1 << 16])


def _parsed(content: bytes) -> LockHolder | None:
    try:
        holder = LockHolder(**json.loads(content))
        int(holder.pid), int(holder.started), float(holder.since)
    except (ValueError, TypeError):
        return None
    return holder
