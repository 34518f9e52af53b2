"""Wrong values for every option of every command and every setting of a run."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megagrow.errors import MegagrowError
from tests.jobs import command

SECONDS = 60  # after which a command hangs
# Written as YAML and as command-line words.  `{directory}` and the like are created per case.
VALUES = {
    "nothing": "",
    "null": "null",
    "text": "wide",
    "negative": "-1",
    "zero": "0",
    "a half": "0.5",
    "nan": ".nan",
    "nan of C": "nan",
    "infinity": ".inf",
    "infinity of C": "inf",
    "huge integer": "9" * 40,
    "very huge integer": "9" * 5000,
    "large integer": "1000000007",
    "huge number": "1e308",
    "beyond": "1e999",
    "tiny": "1e-320",
    "true": "true",
    "list": "[1, 2]",
    "section": "{a: 1}",
    "nested": "[" * 120 + "]" * 120,
    "unclosed": "{a: [",
    "unicode": "größe-日本語-\u202e\U0001f40d",
    "lone surrogate": "\udcff",
    "zero byte": '"a\\0b"',
    "digits that are none": "²³",
    "digits of others": "٣",
    "long": "x" * 5000,
    "a dash": "-",
    "two dashes": "--",
    "options": "--help-me",
    "a directory": "{directory}",
    "a missing path": "{directory}/missing/deeper",
    "below a file": "{file}/below",
    "binary": "{binary}",
    "empty file": "{empty}",
    "home": "~nobody-is-called-so/x",
    "device": "/dev/null",
    "blank": " ",
    "line end": "a\nb",
    "percent": "%s%n{}",
}


# Of every path below a directory: size and modification time, or None for a directory.
Snapshot = Mapping[Path, tuple[int, int] | None]


class WouldStartError(MegagrowError):
    """The command has rejected nothing and would start its work now."""


@dataclass(frozen=True)
class Said:
    """The outcome of a command: its exit status and everything it printed."""

    status: int
    text: str


def load(name: str) -> ModuleType:
    """Import a command's module from launch/."""
    return command(name)


def call(module: ModuleType, arguments: Sequence[str]) -> Said:
    """Run a command's `main` in this process; any exception it raises fails the test.

    An exception other than SystemExit is what a user would see as a traceback.
    """
    out = io.StringIO()
    before = sys.argv

    def hang(*_: object) -> None:
        raise AssertionError(f"hangs: {arguments}")

    old = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    sys.argv = [str(module.__file__), *arguments]
    status: Any
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                status = module.main()
            except SystemExit as stop:
                status = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        sys.argv = before
    if not isinstance(status, int):
        status = 0 if status is None else 1
    return Said(status, out.getvalue())


def filled(value: str, place: Path) -> str:
    """A value with a case's paths, which are in `place`."""
    for name in ("directory", "file", "binary", "empty"):
        value = value.replace(f"{{{name}}}", str(place / name))
    return value


def make_places(place: Path) -> Path:
    """The paths that values refer to, as they are before every case."""
    shutil.rmtree(place / "directory", ignore_errors=True)
    (place / "directory").mkdir(parents=True)
    (place / "file").write_text("some text\n")
    (place / "binary").write_bytes(bytes(range(256)) * 40)
    (place / "empty").write_bytes(b"")
    return place


def options_of(module: ModuleType, *first: str) -> list[tuple[str, bool]]:
    """The options of a command according to its --help: name, and whether it takes a value."""
    text = call(module, [*first, "--help"]).text
    found = re.findall(r"^  (?:-\w, )?(--[a-z][a-z-]+)( [^ ]|$|  )", text, re.MULTILINE)
    return [(name, rest.strip() != "") for name, rest in found if name != "--help"]


def left_behind(directory: Path, before: Snapshot) -> list[str]:
    """Files and directories that a command has created, changed or removed."""
    after = snapshot(directory)
    return sorted(str(path) for path in {**before, **after} if before.get(path) != after.get(path))


def snapshot(directory: Path) -> Snapshot:
    """Every path below a directory, with size and modification time if it is a file."""
    found: dict[Path, tuple[int, int] | None] = {}
    for path in Path(directory).rglob("*"):
        stat = path.lstat()
        found[path.relative_to(directory)] = (
            None if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
        )
    return found


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Temporarily change the working directory."""
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
