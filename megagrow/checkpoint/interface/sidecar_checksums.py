"""Sidecar checksums for exports, because most foreign formats have none.

`megagrow.checksums.json` lists the size of each file with values and the CRC-32 of each chunk.
Other programs ignore it; megagrow checks it when reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagrow.checkpoint.io.checksum import CHUNK_BYTES, checksum_count
from megagrow.checkpoint.io.files import RESTORE, naming, write_new
from megagrow.checkpoint.io.strict_json import read_json
from megagrow.config.load import in_words
from megagrow.errors import CheckpointError

NAME = "megagrow.checksums.json"
FIX = f"restore the file from a copy; if it was changed on purpose, delete {NAME}"
_LIMIT = 256 << 20


class SealedFile(BaseModel):
    """Size and checksums of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: Annotated[int, Field(ge=0, lt=2**62)]
    crc32: list[Annotated[str, Field(pattern=r"^[0-9a-f]{8}\z")]]


def write_seal(
    path: Path, sizes: Mapping[str, int], checksums: Mapping[str, Sequence[str]]
) -> None:
    """Write the checksums of files, named relative to `path`, the checkpoint's directory."""
    files = {n: {"size": sizes[n], "crc32": list(sums)} for n, sums in sorted(checksums.items())}
    body = {"chunk_bytes": CHUNK_BYTES, "files": files}
    text = json.dumps({"sha256": _digest(body), **body}, separators=(",", ":"))
    with naming(path / NAME, "cannot be written"):
        write_new(path / NAME, text.encode())


def read_seal(path: Path) -> tuple[dict[str, SealedFile], int]:
    """The files of a checkpoint with sidecar checksums, and the chunk size; ({}, 0) without any.

    Raises:
        CheckpointError: the checksum file is damaged.
    """
    where = path / NAME
    if not where.exists():
        return {}, 0
    content = read_json(where, _LIMIT)
    stated = content.pop("sha256", None)
    try:
        if stated != _digest(content) or content["chunk_bytes"] != CHUNK_BYTES:
            raise ValueError("another SHA-256 than it states")
        files = {str(n): SealedFile.model_validate(f) for n, f in content["files"].items()}
        for name, file in files.items():
            if len(file.crc32) != checksum_count(file.size, CHUNK_BYTES):
                raise ValueError(f"number of checksums of {name}")
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        raise CheckpointError(
            f"{where}: damaged", found=in_words(error)[:300], fix=RESTORE
        ) from None
    return files, CHUNK_BYTES


def _digest(body: Mapping[str, object]) -> str:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
