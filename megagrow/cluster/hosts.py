"""Start and end the ranks of a job: on this machine, or on many over ssh."""

from __future__ import annotations

import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import megagrow
from megagrow.background import Pool
from megagrow.cluster import launchers, network
from megagrow.cluster.hostfile import Host, read_hostfile
from megagrow.cluster.lifeline import VARIABLE as LIFELINE
from megagrow.cluster.process import Launcher
from megagrow.cluster.ranklog import VARIABLE as LOGS
from megagrow.cluster.roster import Failure
from megagrow.errors import MegagrowError

_AT_ONCE = 64  # concurrent ssh connections
_SSH_SECONDS = 30.0
_PORTS = (20_000, 30_000)  # below the range of ephemeral ports


@dataclass(frozen=True)
class Attempt:
    """What the ranks of one attempt must know.

    Attributes:
        script: the script and its arguments.
        port, token: of the exchange that their lifelines connect to.
        logs: directory for each rank's log, or None.
    """

    script: Sequence[str]
    port: int
    token: str
    logs: Path | None

    def environ(self, address: str) -> dict[str, str]:
        """The variables for ranks that reach the supervisor at this address."""
        values = {LIFELINE: f"{address}:{self.port}:{self.token}"}
        return values | ({LOGS: str(self.logs)} if self.logs is not None else {})


class Fleet(Protocol):
    """Starts and ends the ranks of successive attempts."""

    def start(self, attempt: Attempt) -> None:
        """Start the ranks; raises MegagrowError if they cannot be started."""
        ...

    def poll(self) -> list[Failure]:
        """Failures other than the ranks' own since the last call."""
        ...

    def signals(self) -> list[int]:
        """Signals received by other parts of the supervisor since the last call."""
        ...

    def ended(self) -> str | None:
        """How the launchers ended, in words, once all have; None before."""
        ...

    def end(self) -> list[str]:
        """End everything left of the attempt; returns the hosts where that failed."""
        ...

    def finish(self, status: int) -> None:
        """Called when no attempt follows."""
        ...


class _OneLauncher:
    """Shared by the fleets with one launcher."""

    def __init__(self) -> None:
        self._launcher: Launcher | None = None

    def poll(self) -> list[Failure]:
        """Nothing: the launcher's own end is reported by `ended`."""
        return []

    def signals(self) -> list[int]:
        """None: this process is the whole supervisor."""
        return []

    def ended(self) -> str | None:
        """How the launcher ended."""
        status = self._launcher.status() if self._launcher is not None else None
        return None if status is None else f"the launcher ended with status {status}"

    def finish(self, status: int) -> None:
        """Nothing to do."""

    def _end_launcher(self) -> list[str]:
        if self._launcher is None:
            return []
        left = self._launcher.end()
        self._launcher = None
        return [f"this host (processes {', '.join(map(str, left))})"] if left else []


class Here(_OneLauncher):
    """This machine alone.

    Args:
        ranks: number of ranks, or None for one per device.
        environ: of the launcher and the ranks.
    """

    def __init__(self, *, ranks: int | None, environ: Mapping[str, str]) -> None:
        super().__init__()
        self._ranks, self._environ = ranks, environ

    def start(self, attempt: Attempt) -> None:
        """Start DeepSpeed's launcher here, on a free port."""
        command = launchers.here(
            attempt.script, ranks=self._ranks, port=network.free_port(), environ=self._environ
        )
        self._launcher = Launcher(
            command.with_environ(**attempt.environ("127.0.0.1")),
            mark=secrets.token_hex(8),
            log=attempt.logs and attempt.logs / "console.log",
        )

    def end(self) -> list[str]:
        """End the launcher and its ranks."""
        return self._end_launcher()


class OverSsh(_OneLauncher):
    """The hosts of a file, which is read again for every attempt.

    Args:
        hostfile: its path.
        environ: of the launcher; `environment.carried` selects what the ranks see of it.
        also: additional names for that.
        address: this machine's address as the hosts reach it; None detects it.
        master_port: for rank 0; None picks a random one.
    """

    def __init__(
        self,
        *,
        hostfile: Path,
        environ: Mapping[str, str],
        also: Sequence[str] = (),
        address: str | None = None,
        master_port: int | None = None,
    ) -> None:
        super().__init__()
        self._hostfile, self._environ, self._also = hostfile, environ, also
        self._address, self._master_port = address, master_port
        self._hosts: tuple[Host, ...] = ()
        self._mark = ""
        self._directory = tempfile.TemporaryDirectory(prefix="megagrow-")

    def start(self, attempt: Attempt) -> None:
        """Check all hosts at once, then start DeepSpeed's launcher over them."""
        self._hosts, self._mark = read_hostfile(self._hostfile), secrets.token_hex(8)
        names = [host.name for host in self._hosts]
        address = self._address or network.address_for([*names[1:], names[0]])
        port = self._master_port or random.SystemRandom().randrange(*_PORTS)
        self._check(attempt, address=address, port=port)
        values = attempt.environ(address)
        command = launchers.over_ssh(
            attempt.script,
            hosts=self._hosts,
            master=network.master_address(names[0], names[1:]),
            port=port,
            environ={**self._environ, **values, launchers.MARK: self._mark},
            also=self._also,
            directory=Path(self._directory.name),
        )
        self._launcher = Launcher(
            command, mark=self._mark, log=attempt.logs and attempt.logs / "console.log"
        )

    def end(self) -> list[str]:
        """End what runs here, then what runs on the hosts."""
        left = self._end_launcher()
        if self._mark:
            answers = self._on_hosts(["-m", "megagrow.cluster.kill_leftovers", self._mark])
            left += [f"{name} ({text})" for name, text in answers.items() if text is not None]
            self._mark = ""
        return left

    def _check(self, attempt: Attempt, *, address: str, port: int) -> None:
        check = ["-m", "megagrow.cluster.hostcheck", "--address", address, "--script",
                 str(attempt.script[0]), "--port", str(attempt.port)]  # fmt: skip
        first = self._hosts[0].name
        answers = self._on_hosts(check, extra={first: ["--free", str(port)]})
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
        self, words: Sequence[str], *, extra: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, str | None]:
        """Run Python on all hosts at once; returns None per host, or why it failed."""
        names = [host.name for host in self._hosts]
        more = extra or {}

        def run(name: str) -> str | None:
            command = launchers.ssh(name, [*_python(), *words, *more.get(name, ())])
            try:
                done = subprocess.run(
                    command,
                    env=dict(self._environ),
                    stdin=subprocess.DEVNULL,
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


def _python() -> list[str]:
    """This Python with this package, on a host that has both at the same paths."""
    package = Path(megagrow.__file__).resolve().parent.parent
    return ["env", f"PYTHONPATH={package}", sys.executable]
