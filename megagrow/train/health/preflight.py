"""Checks before training starts: do all hosts of a job agree, and can they work together?

Every rank runs them once it has joined.  The findings are the same on all ranks, so all raise
the same error, which names the hosts.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch

import megagrow
from megagrow.config import Config
from megagrow.data.run_data import RunData
from megagrow.engine.comm import Comm
from megagrow.errors import ConfigError, DataError, MegagrowError, TrainingError
from megagrow.train.health.agree import on_all, on_first
from megagrow.train.opening import existing, require_disk
from megagrow.train.run_plan import RunPlan

CLOCK_SKEW = 30.0  # seconds between two hosts
_KINDS: dict[str, type[MegagrowError]] = {
    kind.__name__: kind for kind in (ConfigError, DataError, TrainingError)
}
_number = itertools.count()  # several jobs may run in one process, one after the other
_SEEN_WITHIN = 10.0  # seconds until a file on a network file system is visible on other hosts


@dataclass(frozen=True)
class Facts:
    """What one rank reports.

    Attributes:
        code: hash of the package's files.
        versions: of Python, PyTorch and DeepSpeed.
        config: hash of the configuration.
        data: fingerprint of the dataset.
        clock: wall time right after a barrier, in seconds.
    """

    rank: int
    host: str
    code: str
    versions: str
    config: str
    data: str
    clock: float

    @property
    def where(self) -> str:
        """The rank and its host, as text."""
        return f"rank {self.rank} on {self.host}"


def preflight(*, config: Config, plan: RunPlan, data: RunData, comm: Comm) -> None:
    """Refuse to start if hosts differ in what must be the same, or lack what they need.

    Raises:
        ConfigError: a host has another version of the code, or another configuration.
        DataError: a host has another dataset.
        TrainingError: clocks differ too much, too little disk, or a run.dir that is not shared.
    """
    hosts = compare(config=config, data=data, comm=comm)
    run_dir = Path(config.run.dir)
    require_shared(run_dir, comm=comm, witnesses=sorted(hosts.values()))
    on_first(comm, lambda: require_disk(config, plan))


def compare(*, config: Config, data: RunData, comm: Comm) -> dict[str, int]:
    """Refuse on all ranks if hosts differ; returns the first rank of each host.

    Over the job's store and in JSON: ranks of other versions need not understand each other's
    pickles.  Rank 0 compares, and tells the others what it found.

    Raises:
        MegagrowError: as `preflight`.
    """
    settings = dict(_flat(config.model_dump(mode="json", by_alias=True)))
    mine = Facts(
        rank=comm.rank,
        host=socket.gethostname(),
        code=code_hash(),
        versions=_versions(),
        config=hashlib.sha256(repr(settings).encode()).hexdigest()[:16],
        data=" ".join(data.datasets),
        clock=time.time(),
    )
    if comm.world == 1:
        return {mine.host: 0}
    store, name = comm.store(config.watch.slow), f"megagrow/preflight/{next(_number)}"
    rank, world = comm.rank, comm.world
    try:
        store.gather(f"{name}/here", True, rank=rank, world=world)
        store.broadcast(f"{name}/now", True, rank=rank)  # so that all read their clocks at once
        row = asdict(replace(mine, clock=time.time())) | {"settings": settings}
        rows = store.gather(f"{name}/facts", row, rank=rank, world=world)
        found: dict[str, Any] = {"hosts": {}}
        if rows is not None:
            all_settings = [row.pop("settings") for row in rows]
            facts = [Facts(**row) for row in rows]
            try:
                require_agreement(facts, settings_of=lambda: all_settings)
                require_clocks(facts)
                found["hosts"] = {fact.host: fact.rank for fact in reversed(facts)}
            except MegagrowError as error:
                found |= {"kind": type(error).__name__, "text": str(error)}
        found = store.broadcast(f"{name}/found", found, rank=rank)
        # Rank 0 may hold the store, and ends if it refuses.
        store.gather(f"{name}/seen", True, rank=rank, world=world)
    except (OSError, RuntimeError) as error:  # torch.distributed's own errors are RuntimeErrors
        raise TrainingError(
            f"rank {rank} on {mine.host}: the ranks could not be compared before the start",
            found=str(error).splitlines()[0],
            expected=f"every rank within watch.slow = {config.watch.slow:g} s",
            fix="see the logs of the ranks in run.dir/logs",
        ) from error
    if "kind" in found:
        raise _KINDS[found["kind"]](found["text"])
    hosts: dict[str, int] = found["hosts"]
    return hosts


# --- what must be the same ------------------------------------------------------------------


def require_agreement(
    facts: Sequence[Facts], *, settings_of: Callable[[], list[dict[str, Any]]]
) -> None:
    """Reject a rank that differs from rank 0 in code, versions, configuration or data.

    Args:
        facts: of all ranks, in rank order.
        settings_of: returns every rank's flat configuration; called on all ranks or none.
    """
    code = "bring all hosts to the same version of the code"
    versions = "install the same versions on all hosts: pip install -c constraints.txt"
    same: Mapping[str, tuple[str, type[MegagrowError], str]] = {
        "code": ("megagrow's files", ConfigError, code),
        "versions": ("versions", ConfigError, versions),
        "config": ("configuration", ConfigError, "start all ranks with the same --config"),
        "data": ("dataset", DataError, "copy the dataset of rank 0's host, or share it"),
    }
    first = facts[0]
    for name, (what, kind, fix) in same.items():
        expected = getattr(first, name)
        others = [fact for fact in facts if getattr(fact, name) != expected]
        if not others:
            continue
        found = f"{getattr(others[0], name)} for {_places(others)}"
        if name == "config":
            mine, theirs = (settings_of()[fact.rank] for fact in (first, others[0]))
            found = f"{_difference(theirs, mine)} for {_places(others)}"
            expected = _difference(mine, theirs)
        raise kind(
            f"{what}: not the same on all hosts",
            found=found,
            expected=f"{expected}, as {first.where} has",
            fix=fix,
        )


def require_clocks(facts: Sequence[Facts]) -> None:
    """Reject clocks so far apart that logs and file times would be misleading."""
    slow, fast = min(facts, key=lambda f: f.clock), max(facts, key=lambda f: f.clock)
    if fast.clock - slow.clock > CLOCK_SKEW:
        raise TrainingError(
            f"the clocks of the hosts are {fast.clock - slow.clock:.0f} s apart",
            found=f"{_time(fast.clock)} for {fast.where}, {_time(slow.clock)} for {slow.where}",
            expected=f"at most {CLOCK_SKEW:g} s",
            fix="let the hosts keep time by NTP (systemctl start systemd-timesyncd, or chrony)",
        )


@cache
def code_hash() -> str:
    """Hash of all Python files of the package, with their names."""
    package = Path(megagrow.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


# --- disk and file system -------------------------------------------------------------------


def require_shared(run_dir: Path, *, comm: Comm, witnesses: Sequence[int]) -> None:
    """Reject a run.dir that is a different directory on another host, or not writable there.

    Rank 0 writes a secret that one rank of each host must find, and vice versa.

    Args:
        run_dir: as configured; if it does not exist yet, its nearest existing parent is checked.
        witnesses: one rank of each host.
    """
    here = socket.gethostname()
    expected = "the same directory on all hosts, on a shared file system, that all may write"
    fix = f"set run.dir to such a directory, or mount it on {here}"
    base = Path(on_first(comm, lambda: str(existing(run_dir).resolve())))
    nonce = comm.broadcast(secrets.token_hex(8))
    place = base / f".megagrow-preflight-{nonce}"

    def write(path: Path) -> None:
        try:
            path.write_text(nonce, encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"run.dir = {run_dir}: cannot be written on {here}",
                found=f"{path.parent}: {error.strerror}",
                expected=expected,
                fix=fix,
            ) from error

    def see(rank: int, host: str) -> None:
        path = place / f"from_rank_{rank}"
        if not _appears(path, nonce):
            raise TrainingError(
                f"run.dir = {run_dir}: {here} and {host} do not share it",
                found=f"what rank {rank} on {host} wrote in {base} is not there for rank "
                f"{comm.rank} on {here}",
                expected=expected,
                fix=fix,
            )

    def begin() -> None:
        try:
            place.mkdir()
        except OSError as error:
            raise TrainingError(
                f"run.dir = {run_dir}: cannot be written on {here}",
                found=f"{base}: {error.strerror}",
                expected=expected,
                fix=fix,
            ) from error
        write(place / "from_rank_0")

    def answer() -> None:
        if comm.rank in witnesses and comm.rank > 0:
            see(0, hosts[0])
            write(place / f"from_rank_{comm.rank}")

    def hear_all() -> None:
        for rank in witnesses:
            see(rank, hosts[rank])

    hosts = comm.all_gather(here)
    try:
        on_first(comm, begin)
        on_all(comm, answer)
        on_first(comm, hear_all)
    finally:
        if comm.rank == 0:
            shutil.rmtree(place, ignore_errors=True)


def _appears(path: Path, content: str) -> bool:
    """Wait until the file becomes visible (NFS caches negative lookups)."""
    end = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            os.listdir(path.parent.parent)  # makes an NFS client ask its server again
            if path.read_text(encoding="utf-8") == content:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


# --- text -----------------------------------------------------------------------------------


def _versions() -> str:
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"deepspeed {deepspeed.__version__}"
    )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{number}")
    else:
        yield key, value


def _difference(settings: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    absent = object()
    keys = [k for k in {**settings, **other} if settings.get(k, absent) != other.get(k, absent)]
    shown = [f"{k} = {settings[k]}" if k in settings else f"no {k}" for k in keys[:4]]
    return ", ".join(shown) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _places(facts: Sequence[Facts]) -> str:
    shown = ", ".join(fact.where for fact in facts[:4])
    return shown + (f" and {len(facts) - 4} more" if len(facts) > 4 else "")


def _time(clock: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(clock))
