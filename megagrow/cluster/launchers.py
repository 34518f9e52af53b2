"""The commands that start the ranks: a rank itself, and DeepSpeed's launcher over ssh."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.cluster.environment import (
    carried,
    remote_argument,
    users_file,
    write_launcher_file,
)
from megagrow.cluster.hostfile import Host
from megagrow.errors import ConfigError, MegagrowError

# A host that is switched off or unreachable is given up after these seconds; without them ssh
# waits for hours.  The user's own options come first, and ssh uses the first.
SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5",
               "ServerAliveCountMax=4")  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command and its environment."""

    words: tuple[str, ...]
    environ: Mapping[str, str]


def rank(script: Sequence[str]) -> list[str]:
    """The script as one rank, without a launcher."""
    return [sys.executable, "-u", *_started(script, "-m")]


def over_ssh(
    script: Sequence[str],
    *,
    hosts: Sequence[Host],
    master: str,
    port: int,
    environ: Mapping[str, str],
    also: Sequence[str],
    directory: Path,
) -> Command:
    """DeepSpeed's launcher over pdsh and ssh.

    Args:
        hosts: of the job; the first one holds rank 0.
        master: its address, as the others reach it.
        environ: of the launcher; `carried` selects what the ranks see of it.
        also: additional names for `carried`.
        directory: for the files that the launcher reads; private to this user.

    Raises:
        ConfigError: pdsh is missing, or the working directory's name cannot be quoted for a shell.
    """
    if shutil.which("pdsh", path=environ.get("PATH")) is None:
        raise ConfigError(
            "--hostfile needs pdsh, by which DeepSpeed's launcher reaches the hosts",
            found="no pdsh on PATH",
            fix="install it (Debian, Ubuntu: apt install pdsh), or let a scheduler start one "
            "launch/supervise.py on each node (--nnodes), which needs no ssh",
        )
    here_is = Path.cwd()
    if not re.fullmatch(r"[\w@+=:,./-]+", str(here_is)):
        raise ConfigError(
            "the launcher cannot go to this working directory on the hosts",
            found=str(here_is),
            expected="a path of letters, digits and any of @+=:,./-_",
            fix="start from another directory, or by a link to this one",
        )
    hostfile = directory / "hostfile"
    hostfile.write_text("".join(f"{h.name} slots={h.slots}\n" for h in hosts), encoding="utf-8")
    values = users_file(environ) | carried(environ, also=also)
    # DeepSpeed would prepend the working directory, but only to its own value.
    values["PYTHONPATH"] = ":".join(filter(None, [str(here_is), values.get("PYTHONPATH")]))
    write_launcher_file(directory / "environment", values)
    words = [
        *_DEEPSPEED, "--quiet", "--hostfile", str(hostfile), "--launcher", "pdsh", "--force_multi",
        # Our own check tests all hosts at once, and more thoroughly.
        "--no_ssh_check", "--master_addr", master, "--master_port", str(port),
        "--launcher_args=-N",  # no name of a host before each line
    ]  # fmt: skip
    options = " ".join(f"-o {option}" for option in SSH_OPTIONS)
    given = environ.get("PDSH_SSH_ARGS_APPEND", "")
    return Command(
        ("env", *_UNSET, *words, *map(remote_argument, _started(script, "--module"))),
        {
            **environ,
            "DS_ENV_FILE": str(directory / "environment"),
            "PDSH_SSH_ARGS_APPEND": f"{given} {options}".strip(),
        },
    )


def resumed(script: Sequence[str]) -> list[str]:
    """The script's arguments for a restart: from the newest undamaged checkpoint."""
    words, out = list(script), []
    while words:
        word = words.pop(0)
        if word == "--resume" and words:
            words.pop(0)
        elif not word.startswith("--resume="):
            out.append(word)
    return [*out, "--resume", "good"]


def ssh(host: str, words: Sequence[str]) -> list[str]:
    """The command that runs words on a host, in the current directory."""
    options = [part for option in SSH_OPTIONS for part in ("-o", option)]
    command = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(words)}"
    return ["ssh", *options, host, command]


def is_installed(script: str) -> bool:
    """Whether the script is not a file but `train`, the command of an installed megagrow."""
    return script == TRAIN and not os.path.isfile(script)


def _started(script: Sequence[str], module: str) -> list[str]:
    """How a launcher starts a script, or a command after its option `module`."""
    return [module, "megagrow", *script] if is_installed(script[0]) else list(script)


def require_script(script: Sequence[str]) -> None:
    """Reject a script that does not exist.

    Raises:
        MegagrowError: says what to write instead.
    """
    # Also False for something that is not a path at all.
    if not script or not (os.path.isfile(script[0]) or is_installed(script[0])):
        raise MegagrowError(
            "the script to start is missing",
            found=script[0] if script else "nothing after the options",
            expected="a Python file, or `train` for `megagrow train`, and its arguments",
            fix="python launch/supervise.py --ranks 2 launch/pretrain.py --config FILE",
        )


TRAIN = "train"
_DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")
# A launcher is no rank, even if it is started as one by the elastic agent.
_UNSET = tuple(f"--unset={name}" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE",
               "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))  # fmt: skip
