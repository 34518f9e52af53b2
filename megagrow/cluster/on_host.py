"""Run on each host of a hostfile over ssh: `python -m megagrow.cluster.on_host check|clear MARK`.

`check` says what would prevent the job from starting there, and stores the job's secret, which it
reads from stdin, in a file that only this user can read.  `clear` kills what is left of the job
and removes that file.  Every process of a job has the job's mark in its environment, and its
children inherit it.  A name (`pkill -f pretrain.py`) would match other jobs, and miss processes
that changed their name.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megagrow.cluster.launchers import is_installed

MARK = "MEGAGROW_JOB"  # the mark, in the environment of every process of the job


def marked(mark: str) -> list[int]:
    """This user's processes on this host that have the mark, except this one."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # already ended, or another user's
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def sweep(mark: str, *, seconds: float = 5.0) -> tuple[int, list[int]]:
    """SIGKILL all of them, including those that they start meanwhile.

    Returns:
        How many were killed, and which still exist when the time is up: they hang in the kernel,
        as on a dead disk.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except (ProcessLookupError, PermissionError):
                pass
        time.sleep(0.05)
    return len(killed), left


def secrets_of(mark: str) -> Path:
    """The directory of the job's secret, with a file for each host, since hosts may share it."""
    return Path("/tmp") / f"megagrow-{mark}"


def store(mark: str, secret: str) -> None:
    """Keep the secret for the ranks of this host.

    Raises:
        OSError: it cannot be written, or its directory is another user's.
    """
    directory = secrets_of(mark)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode != stat.S_IFDIR | 0o700:
        raise PermissionError(errno.EACCES, "it is not a directory of this user alone")
    path = directory / socket.gethostname()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secret)


def faults(options: argparse.Namespace) -> list[str]:
    """What would prevent the job from starting here, in words."""
    found = []
    host, port = options.supervisor
    if not Path(options.script).is_file() and not is_installed(options.script):
        found.append(f"{options.script} is not there: the directory is not shared")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        found.append(
            f"the supervisor at {host}:{port} cannot be reached from here: "
            f"{error.strerror or error}"
        )
    if options.free is not None:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", options.free))
        except OSError as error:
            found.append(f"port {options.free}, for rank 0: {error.strerror or error}")
    try:
        store(options.mark, sys.stdin.read())
    except OSError as error:
        found.append(f"{secrets_of(options.mark)}: {error.strerror}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked; returns 0, or 1 after saying what is wrong in one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["check", "clear"])
    parser.add_argument("mark", help="of the job's processes")
    parser.add_argument("--supervisor", nargs=2, metavar=("HOST", "PORT"))
    parser.add_argument("--script", help="that the ranks will run")
    parser.add_argument("--free", type=int, help="a port that rank 0 needs here")
    options = parser.parse_args(arguments)
    if options.what == "check":
        found = faults(options)
        if found:
            print("; ".join(found), file=sys.stderr)
        return 1 if found else 0
    secret = secrets_of(options.mark) / socket.gethostname()
    with contextlib.suppress(OSError):
        secret.unlink()
        secret.parent.rmdir()  # by the last host, if they share it
    _, left = sweep(options.mark)
    if left:
        print(f"processes {', '.join(map(str, left))} do not end", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
