"""JSON with limits: no duplicate keys, no huge numbers, no huge files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megagrow.checkpoint.io.files import (
    RESTORE,
    read_small,
)
from megagrow.errors import CheckpointError


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """Read a JSON file whose value is an object (raises CheckpointError)."""
    return parse_json(read_small(path, limit), where=str(path))


def parse_json(text: bytes, *, where: str) -> dict[str, Any]:
    """Parse an object, without duplicate keys or numbers out of range (raises CheckpointError)."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_no_duplicates, parse_int=_bounded)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise CheckpointError(f"{where}: not valid JSON", found=reason[:200], fix=RESTORE) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: not a JSON object", fix=RESTORE)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key comes twice")
    return content


def _bounded(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
