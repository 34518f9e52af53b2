"""The log of a run, `metrics.jsonl`: one JSON object per line, each with an `event`.

JSON has no non-finite floats: they are written as the strings "nan", "inf" and "-inf", and the
reader converts exactly these strings back.
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

_LONGEST = 4 << 20  # bytes per line; the longest lines that runs write have thousands
_BLOCK = 1 << 16

_DAMAGE = (ValueError, TypeError, RecursionError)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_line(line: Line) -> bytes:
    """One log line as bytes, with newline: strict JSON for any floats."""
    return json.dumps(_to_json(line), allow_nan=False).encode() + b"\n"


def read_metrics(path: str | Path) -> list[Line]:
    """All lines of a log in order; use `iter_metrics` for long logs.

    Raises:
        DataError: as `iter_metrics`.
    """
    return list(iter_metrics(path))


def iter_metrics(path: str | Path) -> Iterator[Line]:
    """Iterate over the lines of a log, reading lazily.

    An incomplete last line of a killed run is skipped.

    Raises:
        DataError: the file cannot be read, or a line is damaged (named by its number).
    """
    for _, line in read_lines(Path(path)):
        yield line


def read_lines(path: Path, *, start: int = 0) -> Iterator[tuple[bytes, Line]]:
    """Like `iter_metrics`, with the raw bytes of each line (newline included).

    Args:
        start: byte offset of the first line to read.
    """
    with _opened(path) as stream:
        stream.seek(start)
        for number, raw in enumerate(iter(lambda: stream.readline(_LONGEST), b""), start=1):
            if not raw.endswith(b"\n") and len(raw) < _LONGEST:
                # A line is written together with its newline, so this line was cut off by a kill;
                # it may still be complete.
                with contextlib.suppress(*_DAMAGE):
                    yield raw + b"\n", _parse(raw)
                return
            try:
                yield raw, _parse(raw)
            except _DAMAGE as error:
                raise _damaged(path, number + _lines_before(path, start), raw, error) from error


def tail_start(path: Path, *, step: int, stage: int | None) -> int:
    """The byte offset of the last training step of at most `step` (and `stage`), or 0.

    Steps only increase in a log, so all lines before that one are of at most that step. The file is
    read from the end, no farther than needed: damage before that line is not noticed.

    Raises:
        DataError: the file cannot be read.
    """
    with _opened(path) as stream:
        for offset, raw in _backwards(stream):
            try:
                line = _parse(raw)
            except _DAMAGE:
                continue  # a reader that starts at the returned offset will find it
            at, of = line.get("step"), line.get("growth_stage")
            if line["event"] != "step" or not isinstance(at, int) or not isinstance(of, int):
                continue
            if at <= step and (stage is None or of <= stage):
                return offset
    return 0


def last_line(path: Path) -> Line | None:
    """The last complete line of a log, read from its end, or None.

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
        # The part before the first newline belongs to a line that begins earlier.
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
