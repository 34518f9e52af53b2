"""One job at a time in a directory: locks that also work between hosts, and that outlive no job.

A lock is a small file that says who holds it, made by link(2), which is atomic on NFS as well.
While it is held a thread refreshes the file's time.  A holder that was killed leaves the file
behind, which tells of its end:

- on the machine where the process ran, because the process is gone, or another has its number;
- elsewhere, because the file has not been refreshed for `SILENT` seconds, by the clock of the
  file system, which is the only one that both machines read.

Whoever removes the file takes the lock from its holder, who notices and must stop: see `lost`.
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

NAME = "run.lock"  # inside a run's directory
BEAT = 5.0  # seconds between two refreshments
SILENT = 60.0  # seconds without one after which a holder on another machine counts as gone
_POLL = 0.25
_HIDDEN = -1  # the start of a process that exists, but may not be looked at


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says.

    Attributes:
        host, pid: the process, for people.
        machine: tells whether a process number means the same here as there.
        started: when the process started, in the system's ticks.
        since: when it took the lock, in seconds since 1970 of its own clock.
        command: what it was started as.
        token: of this lock alone.
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
    def me() -> Holder:
        """This process, with a new token."""
        return Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()) or 0,
            since=time.time(),
            command=shlex.join(sys.orig_argv)[:2000],
            token=secrets.token_hex(8),
        )


@dataclass(frozen=True)
class _Found:
    """A lock file as it is now; `holder` is None where the file is none of ours, or half written.

    Attributes:
        age: seconds since it was refreshed, by the clock of its file system.
    """

    holder: Holder | None
    age: float

    @property
    def gone(self) -> str:
        """Why its holder holds it no more, or ""."""
        if self.holder is not None and self.holder.machine == _machine():
            same = _started(self.holder.pid) in (self.holder.started, _HIDDEN)
            return "" if same else "that process is gone"
        return f"nothing was heard of it for {self.age:.0f} s" if self.age > SILENT else ""


class Lock:
    """A lock that this process holds, refreshed until it is released.

    Args:
        path: of the lock's file.
        mine: what stands in it.
        on_lost: called in the lock's thread, once it sees that the lock is lost.
    """

    def __init__(
        self, path: Path, mine: Holder, on_lost: Callable[[], object] = lambda: None
    ) -> None:
        self.path, self._mine, self._on_lost = path, mine, on_lost
        self._lost = ""
        self._loop = Loop(f"lock {path}", self._beat, every=BEAT)
        self._loop.start()

    def lost(self) -> str:
        """How the lock was lost, or ""; reads the file."""
        if not self._lost:
            try:
                found = _holder(self.path)
            except (FileNotFoundError, NotADirectoryError):
                there = self.path.parent.is_dir()
                self._lost = f"{self.path if there else self.path.parent} was removed or renamed"
            except OSError:
                pass  # not known at present; the thread reports it and looks again
            else:
                if found is None or found.token != self._mine.token:
                    self._lost = f"{self.path} was taken over by {found or 'an unknown job'}"
        return self._lost

    def require(self) -> None:
        """Refuse to go on without the lock.

        Raises:
            LockError: it was lost.
        """
        if self.lost():
            raise LockError(
                f"{self.path.parent}: this job no longer has it to itself, and stops",
                found=self._lost,
                expected=f"the lock of {self._mine}",
                fix="start it again once no other job writes there; what was saved before is "
                "as it was, unless it was removed",
            )

    def release(self) -> None:
        """Give it up; what has become another's lock stays."""
        self._loop.stop()
        with contextlib.suppress(FileNotFoundError):
            found = _holder(self.path)
            if found is not None and found.token == self._mine.token:
                self.path.unlink()

    def _beat(self) -> bool:
        """Refresh it; True, which ends the thread, once it is lost."""
        if self.lost():
            _say(f"warning: {self._lost}; this job stops writing")
            self._on_lost()
            return True
        # Without times: the file system's own, not this machine's.
        with contextlib.suppress(FileNotFoundError):  # the next look tells
            os.utime(self.path)
        return False


def beside(output: Path) -> Path:
    """The lock of an output that is replaced as a whole, or may not be there yet."""
    whole = output.absolute()
    return whole.with_name(f".{whole.name}.lock")


@contextlib.contextmanager
def holding_output(output: Path) -> Iterator[Lock]:
    """Hold the lock of a command's output while the block lasts; for the main thread.

    Where the lock is lost the block is interrupted.

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
    """End what this process does, in its main thread and in processes of its own."""
    for child in multiprocessing.active_children():
        child.terminate()
    os.kill(os.getpid(), signal.SIGINT)


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
        path: of the lock's file; directories above it are made.
        of: what it locks, in words, for messages.
        wait: seconds to wait for another holder to end.  Where it may be gone, the time that it
            takes to know is waited in any case.
        elsewhere: how to write to another place, for messages.
        runs: locks of runs that it may lie in, which nobody may hold.
        say: is told of waiting, and of a lock that is taken over from a holder that is gone.
        on_lost: of the lock.

    Raises:
        LockError: another job holds it, or the file system refuses.
    """
    mine = Holder.me()
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
    except OSError as error:
        raise LockError(
            f"{of}: cannot be written",
            found=f"{error.filename or path}: {error.strerror or error}",
            expected="a directory, or a name that is free, on a disk with space",
            fix=f"{elsewhere}, or free space",
        ) from error
    return Lock(path, mine, on_lost)


def _take(path: Path, ready: Path, *, of: str, wait: float, say: Callable[[str], object]) -> None:
    """Bring the file that is `ready` to its place, whatever time that takes, within limits."""
    begun, waits = time.monotonic(), False
    while not _put(ready, path):
        try:
            found = _look(path, ready)
        except FileNotFoundError:
            continue  # it was released just now
        if found.gone:
            if _take_over(path, found, ready):
                say(f"{of}: a lock is taken over from a job that has ended ({found.gone}): "
                    f"{found.holder or 'it left no name'}")  # fmt: skip
                return
        else:
            limit = wait
            if found.age > 3 * BEAT and _elsewhere(found):
                limit = max(wait, SILENT + 2 * BEAT)  # by then it is known
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
    return found.holder is None or found.holder.machine != _machine()


# --- files --------------------------------------------------------------------------------


def _put(ready: Path, path: Path) -> bool:
    """Give a file that is ready its name as well, unless there is such a file."""
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
    """Put this holder in the place of one that is gone; False where another was quicker."""
    stale = found.holder.token if found.holder is not None else "unknown"
    claim = path.with_name(f"{path.name}.{stale}.taken")
    # Of all that see the same dead lock, one may replace it.
    if not _put(ready, claim):
        with contextlib.suppress(FileNotFoundError):
            if _look(claim, ready).gone:  # it died while it did so
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


def _sweep(path: Path, ready: Path) -> None:
    """Delete what others left that were killed while they took this lock."""
    for left in path.parent.iterdir():
        if left.name.startswith(f"{path.name}.") and left != ready:
            with contextlib.suppress(FileNotFoundError):
                if _look(left, path).gone:
                    left.unlink()


def _look(path: Path, probe: Path) -> _Found:
    """A lock's file as it is now (FileNotFoundError where there is none).

    Args:
        probe: a file of this process, to read the file system's clock by.
    """
    with open(path, "rb") as stream:  # opened: NFS then asks its server for the true times
        refreshed, holder = os.fstat(stream.fileno()).st_mtime, _parsed(stream.read(1 << 16))
    os.utime(probe)  # without times: the file system's own
    return _Found(holder, max(0.0, probe.stat().st_mtime - refreshed))


def _holder(path: Path) -> Holder | None:
    return _parsed(path.read_bytes()[: 1 << 16])


def _parsed(content: bytes) -> Holder | None:
    try:
        holder = Holder(**json.loads(content))
        int(holder.pid), int(holder.started), float(holder.since)
    except (ValueError, TypeError):
        return None
    return holder


# --- processes ----------------------------------------------------------------------------


def _machine() -> str:
    """Of this boot of this machine, and of the processes that see each other's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """When a process of this machine started, in ticks; None where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return _HIDDEN
        except OSError:
            return None
        return _HIDDEN
    fields = text.rpartition(")")[2].split()  # the name in brackets may hold anything
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie writes no more
