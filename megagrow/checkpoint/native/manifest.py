"""manifest.json: the declared contents of a checkpoint.

The file is one line, `{"sha256":"<digest>","body":{...}}`, where the digest is that
of the body's bytes, so damage is found before anything is parsed.  The parsed
values are still not trusted: sizes are capped and every type is checked here; `proof` then
checks that the claims are consistent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import megagrow
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.io.files import RESTORE
from megagrow.checkpoint.native.shard_file import Part, ShardPlan
from megagrow.config.load import in_words
from megagrow.errors import CheckpointError
from megagrow.state.catalog import InitKind, SlotKind, Training
from megagrow.state.roles import Role

NAME = "manifest.json"
FORMAT = "megagrow checkpoint"
VERSION = 1
BYTES_LIMIT = 256 << 20  # about 2 million boxes
NO_CHECKSUM = "0" * 8

_OPENING = b'{"sha256":"'
_MIDDLE = b'","body":'
_CLOSING = b"}\n"
_DIGITS_LIMIT = 64  # digits per number in JSON; 128-bit random states have 39

Count = Annotated[int, Field(ge=0, lt=2**62)]
Length = Annotated[int, Field(ge=1, lt=2**48)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Multiple = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Axes = Field(max_length=16)


# --- the schema ---------------------------------------------------------------------------


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InitRecord(_Record):
    """`state.catalog.Init`."""

    kind: InitKind
    std: Annotated[float, Field(ge=0.0)]


class RatesRecord(_Record):
    """`state.catalog.Rates`."""

    lr: Multiple = 1.0
    eps: Multiple = 1.0
    orthogonal: Multiple = 1.0


class TensorRecord(_Record):
    """`state.catalog.LogicalTensor`."""

    name: Name
    shape: Annotated[list[Length], Axes]
    axes: Annotated[list[Name], Axes]
    init: InitRecord
    decay: bool
    places: list[Count]
    # An earlier version had no roles, and stored under this key what is now `training`.
    role: Role | Training | None = None
    reads: Annotated[list[Name], Axes] = []
    centred: bool = False
    scaled: bool = False
    offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    kind: Annotated[str, Field(max_length=200)] = ""
    training: Training = "trained"
    aliases: list[Name] = []
    rates: RatesRecord = RatesRecord()


class SlotRecord(_Record):
    """`state.catalog.Slot`."""

    name: Name
    kind: SlotKind
    matrices: bool = True


class LayoutRecord(_Record):
    """A `megagrow.state.layout.Layout`."""

    data: Length
    tensor: Length
    pipeline: Length
    zero: Literal[0, 1, 2, 3]


class EntryRecord(_Record):
    """One box in a file; `start` is the offset of its first byte."""

    tensor: Name
    slot: Name
    offset: Annotated[list[Count], Axes]
    shape: Annotated[list[Length], Axes]
    dtype: str
    start: Count


class FileRecord(_Record):
    """One rank's file: size in bytes, checksum of each chunk, boxes in file order."""

    name: str
    size: Count
    crc32: list[Annotated[str, Field(pattern=r"^[0-9a-f]{8}\z")]]
    entries: list[EntryRecord]


class Manifest(_Record):
    """The body of manifest.json."""

    format: Literal["megagrow checkpoint"]
    version: Literal[1]
    megagrow: str
    save: Annotated[str, Field(pattern=r"^[0-9a-f]{16}\z")]
    step: Annotated[int, Field(ge=0, lt=10**15)]
    world: Length
    layout: LayoutRecord
    chunk_bytes: Annotated[int, Field(ge=64, le=64 << 20, multiple_of=8)]
    slots: Annotated[list[SlotRecord], Field(min_length=1, max_length=64)]
    catalog: Annotated[list[TensorRecord], Field(min_length=1)]
    fingerprints: dict[str, str]
    config: dict[str, Any]
    run_state: dict[str, Any]
    files: list[FileRecord]


# --- writing ------------------------------------------------------------------------------


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def stamp(*, save: str, step: int, rank: int) -> dict[str, str]:
    """The metadata in a file's own header that says where it belongs."""
    return {"format": "pt", "megagrow_save": save, "step": str(step), "rank": str(rank)}


def file_record(
    rank: int, parts: Sequence[Part], plan: ShardPlan, checksums: Sequence[str]
) -> dict[str, Any]:
    """A FileRecord as plain data."""
    entries = [
        {
            "tensor": part.tensor,
            "slot": part.slot,
            "offset": part.box.offset,
            "shape": part.box.shape,
            "dtype": part.dtype,
            "start": start,
        }
        for part, start in zip(parts, plan.starts, strict=True)
    ]
    name = file_name(rank)
    return {"name": name, "size": plan.size, "crc32": list(checksums), "entries": entries}


def seal(
    meta: CheckpointMeta,
    *,
    save: str,
    step: int,
    chunk_bytes: int,
    files: Sequence[Mapping[str, Any]],
) -> bytes:
    """The bytes of manifest.json.

    Raises:
        ValueError, TypeError: the configuration or the run state holds something JSON cannot.
    """
    body = {
        "format": FORMAT,
        "version": VERSION,
        "megagrow": megagrow.__version__,
        "save": save,
        "step": step,
        "world": len(files),
        "layout": asdict(meta.layout),
        "chunk_bytes": chunk_bytes,
        "slots": [slot.to_json() for slot in meta.slots],
        "catalog": meta.catalog.to_json(),
        "fingerprints": plain(meta.fingerprints, "fingerprints"),
        "config": plain(meta.config, "config"),
        "run_state": plain(meta.run_state, "run_state"),
        "files": files,
    }
    text = json.dumps(body, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    return _OPENING + _digest(text) + _MIDDLE + text + _CLOSING


def plain(value: Any, where: str) -> Any:
    """The value after a round trip through JSON; refused if it would change."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a text")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: JSON holds finite numbers only")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{where}: a {type(value).__name__} cannot be saved in JSON")


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


# --- reading ------------------------------------------------------------------------------


def unseal(data: bytes, *, where: str) -> Manifest:
    """Check and parse the bytes of manifest.json; `where` names it in errors.

    Raises:
        CheckpointError: damaged, of another version, or not what the schema says.
    """
    start = len(_OPENING) + 64 + len(_MIDDLE)
    head, body = data[:start], data[start : -len(_CLOSING)]
    if head != _OPENING + _digest(body) + _MIDDLE or not data.endswith(_CLOSING):
        raise CheckpointError(
            f"{where}: damaged, or not a manifest of megagrow",
            found="its content does not have the SHA-256 that it states",
            fix=RESTORE,
        )
    try:
        content = json.loads(
            body.decode(),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise CheckpointError(f"{where}: not valid: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON", found=error) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not the manifest of a megagrow checkpoint")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise CheckpointError(
            f"{where}: format version is not known here",
            found=f"version {content.get('version')!r}, by megagrow {content.get('megagrow')!r}",
            expected=f"version {VERSION}",
            fix="install the megagrow that wrote it",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {in_words(error)[:500]}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} comes twice")
    return content


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _bounded_int(text: str) -> int:
    if len(text) > _DIGITS_LIMIT:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:_DIGITS_LIMIT]} is out of range")
    return value
