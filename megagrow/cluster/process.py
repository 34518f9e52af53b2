"""A launcher as a process: forwards its output, and ends everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from megagrow.background import Loop
from megagrow.cluster.kill_leftovers import VARIABLE, sweep
from megagrow.cluster.launchers import Command

_PATIENCE_SECONDS = 3.0
_OUTPUT_SECONDS = 2.0


class Launcher:
    """Runs one command in its own session.

    Args:
        command: the command; its host prefixes are removed from its output.
        mark: set in the environment of everything that it starts, to find those processes again.
        log: a file that gets a copy of the output, in addition to this process's stdout.
    """

    def __init__(self, command: Command, *, mark: str, log: Path | None = None) -> None:
        self.mark, self._prefixes = mark, command.prefixes
        self._log = log.open("ab") if log is not None else None
        self._process = subprocess.Popen(
            command.words,
            env={**command.environ, VARIABLE: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        # Whatever happens to a line, keep reading: a full pipe would block the job.
        self._pump = Loop("launcher output", self._pass_on, every=0.0)
        self._pump.start()

    @property
    def pid(self) -> int:
        """The launcher's process id."""
        return self._process.pid

    def status(self) -> int | None:
        """Its exit status (negative: the signal that killed it), or None while it runs."""
        return self._process.poll()

    def end(self) -> list[int]:
        """End it and everything that it started on this host.

        Returns:
            Processes that survived SIGKILL: they hang in the kernel, as on a dead disk.
        """
        # Its ranks have already been told, so it will end by itself soon.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_SECONDS)
        # Not SIGTERM: DeepSpeed's launcher would then end every job of its kind on the hosts
        # (`pkill -f`), including other people's under the same account.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        _, left = sweep(self.mark)
        self._process.wait()
        self._pump.join(_OUTPUT_SECONDS)
        return left

    def _pass_on(self) -> bool:
        """Forward one line; True after the last one."""
        line = self._output.readline()
        if not line:
            if self._log is not None:
                self._log.close()
            return True
        text = self._without_prefix(line)
        self._write(sys.stdout.buffer, text)
        if self._log is not None:
            self._write(self._log, text)
        return False

    def _write(self, stream: IO[bytes], text: bytes) -> None:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError) as error:
            self._pump.faults.note(error, doing="passing on a line, which is lost")

    def _without_prefix(self, line: bytes) -> bytes:
        for prefix in self._prefixes:
            if line.startswith(prefix.encode()):
                return line[len(prefix) :]
        return line
