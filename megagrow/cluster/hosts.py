"""What one node of a job starts and ends: its ranks, or DeepSpeed's launcher over ssh."""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import megagrow
from megagrow.background import Pool
from megagrow.cluster import launchers, network, on_host, wire
from megagrow.cluster.hostfile import Host, read_hostfile
from megagrow.cluster.lifeline import ATTEMPT
from megagrow.cluster.lifeline import VARIABLE as LIFELINE
from megagrow.cluster.on_host import MARK
from megagrow.cluster.ranklog import VARIABLE as LOGS
from megagrow.errors import MegagrowError

_AT_ONCE = 64  # concurrent ssh connections
_SSH_SECONDS = 30.0
_PORTS = (20_000, 30_000)  # below the range of ephemeral ports


@dataclass(frozen=True)
class Order:
    """An attempt to take part in.

    Attributes:
        number: from 1; from 2 on the run goes on from its last checkpoint.
        logs: directory for each rank's log, or None.
    """

    number: int
    logs: Path | None


@dataclass(frozen=True)
class Workers:
    """The processes of a node.

    Attributes:
        words: the command of each.
        count: how many.
        environ: in addition to this process's.
        launcher: whether it is not a rank but starts the ranks, on other hosts.
    """

    words: Sequence[str]
    count: int
    environ: dict[str, str] = field(default_factory=dict)
    launcher: bool = False


class Fleet(Protocol):
    """What a node starts and ends in successive attempts.

    Attributes:
        nodes: least and greatest number of nodes that take part.
    """

    nodes: tuple[int, int]

    def prepare(self, order: Order) -> Workers:
        """What to start; raises MegagrowError if it cannot be started."""
        ...

    def clear(self) -> list[str]:
        """End all that is left of the attempt; returns, in words, where that failed."""
        ...


class Ranks:
    """The ranks of this host.

    Args:
        script: what every rank runs, with its arguments.
        ranks: their number on this host.
        secret: of the job.
        nodes: least and greatest number of nodes of the job.
    """

    def __init__(
        self, script: Sequence[str], *, ranks: int, secret: bytes, nodes: tuple[int, int] = (1, 1)
    ) -> None:
        self._script, self._ranks, self._secret, self.nodes = list(script), ranks, secret, nodes
        self._mark = ""

    def prepare(self, order: Order) -> Workers:
        """The script as a rank."""
        self._mark = secrets.token_hex(8)
        script = launchers.resumed(self._script) if order.number > 1 else self._script
        environ = {MARK: self._mark, wire.SECRET: self._secret.decode()}
        return Workers(launchers.rank(script), self._ranks, environ)

    def clear(self) -> list[str]:
        """Kill what has the mark of the attempt."""
        return _clear_here(self._mark)


class OverSsh:
    """The hosts of a file, which is read again for every attempt.

    Args:
        script: what every rank runs, with its arguments.
        hostfile: its path.
        supervisor: its host and port, as the hosts reach it.
        secret: of the job.
        environ: of the launcher; `environment.carried` selects what the ranks see of it.
        also: additional names for that.
        master_port: for rank 0; None picks a random one.
    """

    nodes = (1, 1)

    def __init__(
        self,
        script: Sequence[str],
        *,
        hostfile: Path,
        supervisor: tuple[str, int],
        secret: bytes,
        environ: Mapping[str, str],
        also: Sequence[str] = (),
        master_port: int | None = None,
    ) -> None:
        self._script, self._hostfile, self._supervisor = list(script), hostfile, supervisor
        self._secret, self._environ, self._also = secret, environ, also
        self._master_port = master_port
        self._hosts: tuple[Host, ...] = ()
        self._mark = ""
        self._directory = tempfile.TemporaryDirectory(prefix="megagrow-")

    def prepare(self, order: Order) -> Workers:
        """Check all hosts at once; DeepSpeed's launcher over them."""
        self._hosts, self._mark = read_hostfile(self._hostfile), secrets.token_hex(8)
        script = launchers.resumed(self._script) if order.number > 1 else self._script
        names = [host.name for host in self._hosts]
        port = self._master_port or random.SystemRandom().randrange(*_PORTS)
        self._check(script, port=port)
        host, at = self._supervisor
        values = {
            LIFELINE: f"{host}:{at}",
            ATTEMPT: str(order.number),
            MARK: self._mark,
            # A variable's value would stand in the command lines of pdsh and ssh.
            wire.SECRET_FILE: str(on_host.secrets_of(self._mark)),
        } | ({LOGS: str(order.logs)} if order.logs is not None else {})
        command = launchers.over_ssh(
            script,
            hosts=self._hosts,
            master=network.master_address(names[0], names[1:]),
            port=port,
            environ={**self._environ, **values},
            also=self._also,
            directory=Path(self._directory.name),
        )
        return Workers(command.words, 1, {**command.environ}, launcher=True)

    def clear(self) -> list[str]:
        """End what runs here, then what runs on the hosts."""
        if not self._mark:
            return []
        left = _clear_here(self._mark)
        answers = self._on_hosts(["clear", self._mark])
        self._mark = ""
        return left + [f"{name} ({text})" for name, text in answers.items() if text is not None]

    def _check(self, script: Sequence[str], *, port: int) -> None:
        host, at = self._supervisor
        check = ["check", self._mark, "--supervisor", host, str(at), "--script", script[0]]
        first = self._hosts[0].name
        answers = self._on_hosts(
            check, extra={first: ["--free", str(port)]}, given=self._secret.decode()
        )
        bad = {name: text for name, text in answers.items() if text is not None}
        if bad:
            raise MegagrowError(
                f"{self._hostfile}: {len(bad)} of {len(answers)} hosts cannot take part",
                found="; ".join(f"{name}: {text}" for name, text in list(bad.items())[:8]),
                expected="ssh without a password, the same directories and the same Python on "
                "all hosts, and a way from them to this one",
                fix=f"try: ssh -o BatchMode=yes {next(iter(bad))} hostname; or take the host "
                "out of the hostfile",
            )

    def _on_hosts(
        self,
        words: Sequence[str],
        *,
        extra: Mapping[str, Sequence[str]] | None = None,
        given: str = "",
    ) -> dict[str, str | None]:
        """Run our program on all hosts at once; returns None per host, or why it failed.

        Args:
            extra: further words, by host.
            given: what it reads from stdin, which no other user sees.
        """
        names = [host.name for host in self._hosts]
        package = Path(megagrow.__file__).resolve().parent.parent
        # This Python with this package, on a host that has both at the same paths.
        program = ["env", f"PYTHONPATH={package}", sys.executable, "-m", "megagrow.cluster.on_host"]

        def run(name: str) -> str | None:
            command = launchers.ssh(name, [*program, *words, *(extra or {}).get(name, ())])
            try:
                done = subprocess.run(
                    command,
                    env=dict(self._environ),
                    input=given,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=_SSH_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return f"no answer within {_SSH_SECONDS:g} s"
            except OSError as error:
                return f"ssh: {error.strerror}"
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            return None if done.returncode == 0 else said[-1]

        with Pool(min(_AT_ONCE, len(names)), "ssh") as pool:
            return dict(zip(names, pool.map(run, names), strict=True))


def _clear_here(mark: str) -> list[str]:
    if not mark:
        return []
    _, left = on_host.sweep(mark)
    here = f"this host, {os.uname().nodename}"
    return [f"{here} (processes {', '.join(map(str, left))})"] if left else []
