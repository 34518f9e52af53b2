"""The log of a run, `metrics.jsonl`: one JSON object a line, each with an `event`.

Floats that are not finite have no JSON form: they are written as the strings
"nan", "inf" and "-inf", and reading turns exactly these strings back.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from megagrow.errors import DataError

Line = dict[str, Any]

_DAMAGE = (ValueError, TypeError, RecursionError)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_line(line: Line) -> bytes:
    """One log line in bytes, its newline included: strict JSON whatever the floats."""
    return json.dumps(_to_json(line), allow_nan=False).encode() + b"\n"


def read_metrics(path: str | Path) -> list[Line]:
    """All lines of a log, in their order.

    A last line that a killed run left half written is passed over.

    Raises:
        DataError: the file cannot be read, or a line of it is damaged (named by its number).
    """
    return [line for _, line in read_lines(Path(path))]


def read_lines(path: Path) -> list[tuple[bytes, Line]]:
    """As `read_metrics`, each line with its own bytes (newline included)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the run's log {path}",
            found=error.strerror,
            expected="a metrics.jsonl written by a training run",
            mend="give the directory of a run (its `run.dir`)",
        ) from error
    *complete, rest = content.split(b"\n")
    lines = []
    for number, raw in enumerate(complete, start=1):
        try:
            lines.append((raw + b"\n", _parse(raw)))
        except _DAMAGE as error:
            raise _damaged(path, number, raw, error) from error
    if rest:
        # The newline goes out with its line, so this line was cut by a kill; it may still be whole.
        with contextlib.suppress(*_DAMAGE):
            lines.append((rest + b"\n", _parse(rest)))
    return lines


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
        mend=f"delete line {number}, or move the file away to begin a new log",
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
