"""The log of a run, `metrics.jsonl`: one JSON object a line, each with an `event`.

Floats that are not finite have no JSON form: they are written as the strings
"nan", "inf" and "-inf", and reading turns exactly these strings back.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megagrow.errors import DataError

Line = dict[str, Any]

_LONGEST = 4 << 20  # bytes of a line; the longest that runs write have thousands
_BLOCK = 1 << 16

_DAMAGE = (ValueError, TypeError, RecursionError)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_line(line: Line) -> bytes:
    """One log line in bytes, its newline included: strict JSON whatever the floats."""
    return json.dumps(_to_json(line), allow_nan=False).encode() + b"\n"


def read_metrics(path: str | Path) -> list[Line]:
    """All lines of a log, in their order; `iter_metrics` where they may be many.

    Raises:
        DataError: as `iter_metrics`.
    """
    return list(iter_metrics(path))


def iter_metrics(path: str | Path) -> Iterator[Line]:
    """The lines of a log, one after the other, each read when it is asked for.

    A last line that a killed run left half written is passed over.

    Raises:
        DataError: the file cannot be read, or a line of it is damaged (named by its number).
    """
    for _, line in read_lines(Path(path)):
        yield line


def read_lines(path: Path, *, start: int = 0) -> Iterator[tuple[bytes, Line]]:
    """As `iter_metrics`, each line with its own bytes (newline included).

    Args:
        start: byte at which a line begins; what is before it is not read.
    """
    with _opened(path) as stream:
        stream.seek(start)
        for number, raw in enumerate(iter(lambda: stream.readline(_LONGEST), b""), start=1):
            if not raw.endswith(b"\n") and len(raw) < _LONGEST:
                # The newline goes out with its line, so this line was cut by a kill; it may still
                # be whole.
                with contextlib.suppress(*_DAMAGE):
                    yield raw + b"\n", _parse(raw)
                return
            try:
                yield raw, _parse(raw)
            except _DAMAGE as error:
                raise _damaged(path, number + _lines_before(path, start), raw, error) from error


def tail_start(path: Path, *, step: int, stage: int | None) -> int:
    """Where the last training step of at most `step` (and `stage`) begins: a byte; else 0.

    Steps only rise in a log, so all lines before that one are of at most that step.  Read from
    the end, and no farther than needed: what lies before it is not looked at, nor is damage there
    noticed.

    Raises:
        DataError: the file cannot be read.
    """
    with _opened(path) as stream:
        for offset, raw in _backwards(stream):
            try:
                line = _parse(raw)
            except _DAMAGE:
                continue  # whoever reads on from the returned place comes to it
            at, of = line.get("step"), line.get("growth_stage")
            if line["event"] != "step" or not isinstance(at, int) or not isinstance(of, int):
                continue
            if at <= step and (stage is None or of <= stage):
                return offset
    return 0


def last_line(path: Path) -> Line | None:
    """The last whole line of a log, read from its end; None where there is none.

    Raises:
        DataError: the file cannot be read.
    """
    with _opened(path) as stream:
        for _, raw in _backwards(stream):
            with contextlib.suppress(*_DAMAGE):
                return _parse(raw)
            return None
    return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise DataError(
            f"cannot read the run's log {path}",
            found=error.strerror,
            expected="a metrics.jsonl written by a training run",
            fix="give the directory of a run (its `run.dir`)",
        ) from error


def _backwards(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a file's lines from the last to the first, a block at a time."""
    position, begun = stream.seek(0, os.SEEK_END), b""
    while position > 0 and len(begun) <= _LONGEST:
        size = min(_BLOCK, position)
        position -= size
        stream.seek(position)
        data = stream.read(size) + begun
        # What is before the first newline belongs to a line that begins farther ahead.
        cut = data.find(b"\n") + 1 if position else 0
        at = position + len(data)
        for raw in reversed(data[cut:].splitlines(keepends=True) if cut or not position else []):
            at -= len(raw)
            if raw.endswith(b"\n"):
                yield at, raw
        begun = data[:cut] if cut or not position else data


def _lines_before(path: Path, offset: int) -> int:
    """Number of lines in the first `offset` bytes."""
    count = 0
    with _opened(path) as stream:
        while offset > 0 and (data := stream.read(min(_BLOCK, offset))):
            count += data.count(b"\n")
            offset -= len(data)
    return count


def _parse(raw: bytes) -> Line:
    value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        raise TypeError('not an object with an "event"')
    decoded: Line = _from_json(value)
    return decoded


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _damaged(path: Path, number: int, raw: bytes, error: Exception) -> DataError:
    shown = raw[:80].decode("utf-8", "backslashreplace") + ("…" if len(raw) > 80 else "")
    return DataError(
        f"{path}, line {number}: the log is damaged",
        found=f"{shown!r} ({error})",
        expected='one JSON object a line, with an "event"',
        fix=f"delete line {number}, or move the file away to begin a new log",
    )


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value
