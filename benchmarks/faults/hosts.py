"""Hosts on one machine: `with Hosts(2) as hosts: hosts.run("login", [...])`.

A host is its own set of namespaces: network, host name, processes, shared memory, mounts. Its
first process is an sshd.  `login` is one more host, which holds the switch and from which jobs
are started.  None of them has outside access, and nothing outside changes: no name in
/run/netns, no file in ~/.ssh, no interface.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NET = "10.93.7"
TOOLS = ("unshare", "nsenter", "ip", "mount", "ssh-keygen", "pdsh", "ssh")
SSHD = "/usr/sbin/sshd"

# Runs as the first process of a host.  /run is its own, because sshd wants a directory there.
_BEGIN = """
set -eu
hostname {name}
mount --make-rprivate /
mount --bind {here}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind {here}/disk_{name} {here}/disk
ip link set lo up
echo up > {here}/{name}.up
until [ -e {here}/{name}.wired ]; do sleep 0.02; done
exec {init}
"""
_SSHD_CONFIG = """
HostKey {here}/host_key
AuthorizedKeysFile {here}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
MaxStartups 200
MaxSessions 200
"""
_SSH = """#!/bin/sh
exec /usr/bin/ssh -F none -i {here}/key -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
-o UserKnownHostsFile=/dev/null -o GlobalKnownHostsFile=/dev/null -o LogLevel=ERROR -l root "$@"
"""


@functools.cache
def missing() -> str:
    """What this machine lacks for such hosts, in words; "" if nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces as hosts need Linux and root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not Path(SSHD).exists():
        absent.append("sshd")
    if absent:
        return f"not installed: {', '.join(absent)} (make cluster-tools)"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--mount-proc", "--fork",
         "sh", "-c", "mount --make-rprivate / && mount -t tmpfs tmpfs /run && ip link set lo up && "
         "ip link add veth-a type veth peer name veth-b && ip link add bridge-a type bridge"],
        capture_output=True, text=True,
    )  # fmt: skip
    if probe.returncode:
        said = (probe.stderr.strip().splitlines() or ["?"])[-1]
        return f"this machine does not allow namespaces with mounts and bridges: {said}"
    return ""


class Hosts:
    """`count` hosts h0, h1, ... and `login`.

    Args:
        here: an empty directory, seen by all hosts; `here`/disk is another disk on each.
        loopback_names: each host's own name resolves to 127.0.1.1 there, as on Debian.
    """

    def __init__(self, here: Path, count: int, *, loopback_names: bool = False) -> None:
        self.here, self.names = Path(here), [f"h{i}" for i in range(count)]
        self._loopback_names = loopback_names
        self._shells: dict[str, subprocess.Popen[bytes]] = {}
        self._inits: dict[str, int] = {}

    def __enter__(self) -> Hosts:
        try:
            self._make_files()
            for name in ["login", *self.names]:
                self._begin(name)
            self._wire()
            for name in ["login", *self.names]:
                (self.here / f"{name}.wired").touch()
            for name in self.names:
                self._wait_for_sshd(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name, init in self._inits.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(init, signal.SIGKILL)  # and so everything in its namespaces
            self._shells[name].wait()
        for shell in self._shells.values():
            if shell.poll() is None:
                shell.kill()
                shell.wait()

    def start(
        self,
        name: str,
        words: Sequence[object],
        *,
        environ: Mapping[str, object] | None = None,
        **more: Any,
    ) -> subprocess.Popen[str]:
        """Start a process on a host, in the current directory."""
        path = f"{self.here}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {**(environ or {}), "PATH": path}
        clean = [k for k in os.environ if k.startswith(("MEGAGROW_", "SSH_", "GLOO_"))]
        return subprocess.Popen(
            [
                "nsenter", "-t", str(self._inits[name]), "-n", "-u", "-i", "-p", "-m",
                f"--wd={os.getcwd()}", "env", *(f"--unset={k}" for k in clean),
                *(f"{k}={v}" for k, v in settings.items()), *map(str, words),
            ],
            stdin=subprocess.DEVNULL, text=True, **more,
        )  # fmt: skip

    def run(
        self, name: str, words: Sequence[object], *, timeout: float = 60, **more: Any
    ) -> tuple[int, str]:
        """The same, until it ends: (status, output)."""
        process = self.start(name, words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
        try:
            said, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, said

    def processes(self, name: str, word: str) -> dict[int, str]:
        """Command lines of a host's processes that contain a word, by process id."""
        inside = os.readlink(f"/proc/{self._inits[name]}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and os.readlink(entry / "ns" / "pid") == inside:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if word in line:
                        found[int(entry.name)] = line
        return found

    def ranks(self, script: str = "pretrain.py") -> dict[int, tuple[int, str]]:
        """Process id and host of each rank, by rank."""
        found = {}
        for name in self.names:
            for pid in self.processes(name, script):
                with contextlib.suppress(OSError):
                    items = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    ranks = [item[5:] for item in items if item.startswith(b"RANK=")]
                    if ranks:
                        found[int(ranks[0])] = (pid, name)
        return found

    def cut(self, name: str) -> None:
        """Pull the host's cable."""
        self._in_login(f"ip link set {name} down")

    def heal(self, name: str) -> None:
        """Plug it in again."""
        self._in_login(f"ip link set {name} up")

    # --- creating them --------------------------------------------------------------------

    def _make_files(self) -> None:
        here = self.here
        here.chmod(0o700)
        (here / "bin").mkdir()
        (here / "disk").mkdir()
        for name in ["login", *self.names]:
            (here / f"disk_{name}").mkdir()
        for key in ("key", "host_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(here / key)]
            subprocess.run(make, check=True)
        lines = ["127.0.0.1 localhost", f"{NET}.254 login"]
        lines += [f"{NET}.{10 + i} {name}" for i, name in enumerate(self.names)]
        (here / "hosts").write_text("\n".join(lines) + "\n")
        (here / "sshd_config").write_text(_SSHD_CONFIG.format(here=here))
        ssh = here / "bin" / "ssh"
        ssh.write_text(_SSH.format(here=here))
        ssh.chmod(0o755)

    def _begin(self, name: str) -> None:
        init = "sleep infinity"
        if name != "login":
            init = f"{SSHD} -D -e -f {self.here}/sshd_config"
        text = _BEGIN.format(name=name, here=self.here, init=init)
        if self._loopback_names:
            own = f"{{ echo 127.0.1.1 {name}; cat {self.here}/hosts; }} > {self.here}/hosts_{name}"
            text = text.replace(f"{self.here}/hosts /etc", f"{self.here}/hosts_{name} /etc")
            text = text.replace("set -eu", f"set -eu\n{own}")
        log = (self.here / f"{name}.log").open("w")
        self._shells[name] = subprocess.Popen(
            ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--mount-proc", "--fork",
             "--kill-child", "sh", "-c", text],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self._until(lambda: (self.here / f"{name}.up").exists(), name)
        [child] = Path(f"/proc/{self._shells[name].pid}/task").iterdir()
        self._inits[name] = int((child / "children").read_text())

    def _wire(self) -> None:
        self._in_login(
            "ip link add switch type bridge forward_delay 0 && "
            f"ip addr add {NET}.254/24 dev switch && ip link set switch up"
        )
        for i, name in enumerate(self.names):
            init = self._inits[name]
            self._in_login(
                f"ip link add {name} type veth peer name eth0 netns {init} && "
                f"ip link set {name} master switch up"
            )
            self._in(init, f"ip addr add {NET}.{10 + i}/24 dev eth0 && ip link set eth0 up")

    def _wait_for_sshd(self, name: str) -> None:
        number = self.names.index(name) + 10
        probe = ["bash", "-c", f"exec 3<>/dev/tcp/{NET}.{number}/22"]
        self._until(lambda: self.run("login", probe)[0] == 0, name)

    def _in_login(self, text: str) -> None:
        self._in(self._inits["login"], text)

    def _in(self, init: int, text: str) -> None:
        subprocess.run(["nsenter", "-t", str(init), "-n", "sh", "-c", text], check=True)

    def _until(self, good: Callable[[], bool], name: str) -> None:
        end = time.monotonic() + 30
        while not good():
            log = (self.here / f"{name}.log").read_text()
            assert self._shells[name].poll() is None and time.monotonic() < end, log
            time.sleep(0.02)
