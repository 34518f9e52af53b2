"""Hostfiles: one host per line with its number of ranks, as for DeepSpeed and MPI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megagrow.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_EXAMPLE = "a line such as: node1 slots=8"


@dataclass(frozen=True)
class Host:
    """A host's name or address, and its number of ranks."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> tuple[Host, ...]:
    """Read the hosts of a file, in order: the first one holds rank 0.

    Raises:
        ConfigError: the file is missing, empty or invalid; names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hostfile {path}: cannot be read",
            found=getattr(error, "strerror", None) or error,
            expected="a text file with a host a line",
            fix="write one (node1 slots=8), or leave --hostfile out to run on this machine alone",
        ) from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].split()
        if not content:
            continue
        host = _host(content, where=f"{path}:{number}")
        if host.name in hosts:
            raise ConfigError(
                f"{path}:{number}: host {host.name} is there twice",
                found=line.strip(),
                expected="each host once",
                fix="write one line for it, with all its slots",
            )
        hosts[host.name] = host
    if not hosts:
        raise ConfigError(
            f"{path}: names no host",
            found=f"{len(text.splitlines())} lines, all empty or comments",
            expected=_EXAMPLE,
            fix="add the hosts of the job",
        )
    return tuple(hosts.values())


def _host(words: list[str], *, where: str) -> Host:
    name, settings = words[0], words[1:]
    found = " ".join(words)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: no host name", found=found, expected=_EXAMPLE)
    if len(settings) != 1 or not settings[0].startswith("slots="):
        raise ConfigError(
            f"{where}: the number of ranks is missing or is not alone",
            found=found,
            expected=_EXAMPLE,
            fix=f"write: {name} slots=N, with N the number of its devices",
        )
    slots = settings[0].removeprefix("slots=")
    if not (slots.isdecimal() and slots.isascii() and 0 < int(slots) <= 1024):
        raise ConfigError(
            f"{where}: slots", found=slots, expected="a whole number of ranks, from 1 to 1024"
        )
    return Host(name, int(slots))
