"""Build the library that makes system calls fail; it is preloaded into the tested processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from megagrow.errors import ConfigError

SOURCE = Path(__file__).with_name("shim.c")


def build(directory: Path) -> Path:
    """Compile `shim.c` into `directory`; returns the library for LD_PRELOAD.

    Raises:
        ConfigError: there is no C compiler.
    """
    names = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise ConfigError(
            "no C compiler on PATH: the faults of system calls are made by a small library",
            fix="install one (Debian, Ubuntu: apt install gcc) or set CC",
        )
    library = directory / "faults.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library
