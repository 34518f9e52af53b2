"""Directories of torch.distributed.checkpoint whose state dict has full names.

    .metadata         a pickle: for each name the shape and its chunks, for each chunk file,
                      first byte and length
    __R_N.distcp      chunks, each an archive as torch.save makes it
    megagrow.json     ours: what the format has no place for; other readers pass it by

Parameters go by their own names, Adam's moments by `optimizer.state.<name>.<slot>`, as torch's
flattened optimizer state dicts name them.  A directory that is not ours is read too: its tensors
then have axes without a meaning, so they cannot be cut for tensor parallelism.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.adapter import Format
from megagrow.checkpoint.dcp_sink import METADATA, OURS, DcpSink, digest, stored_name
from megagrow.checkpoint.directory import (
    RESTORE,
    open_regular,
    read_small,
)
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.pickles import Opaque, StoredTensor, brief, read_pickle
from megagrow.checkpoint.safetensors import read_json
from megagrow.checkpoint.seal import NAME as SEAL
from megagrow.checkpoint.shards import DTYPE_NAMES
from megagrow.checkpoint.stored import Record, StoredBox, StoredSource
from megagrow.checkpoint.torchfile import read_torch_file
from megagrow.errors import CheckpointError
from megagrow.layout import Layout
from megagrow.state.boxes import Box
from megagrow.state.catalog import ADAM_SLOTS, MASTER, Catalog, Init, LogicalTensor, Slot, slots_of

_METADATA_LIMIT = 1 << 30
_INSTRUCTIONS = 1 << 26  # a chunk of a tensor takes some 30
_ROOM = "torch.distributed.checkpoint."
_NAMES = frozenset(
    {
        *(
            f"{_ROOM}metadata.{name}"
            for name in (
                "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
            )
        ),
        f"{_ROOM}filesystem._StorageInfo",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.serialization._get_layout",
        "torch.Size",
        "collections.OrderedDict",
        *(f"pathlib.{kind}" for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")),
        *(f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    }
)  # fmt: skip
_DTYPES = {f"torch.{str(dtype).removeprefix('torch.')}": dtype for dtype in DTYPE_NAMES}
_MOMENT = re.compile(r"(?:optimizer\.)?state\.(.+)\.(exp_avg|exp_avg_sq)\Z", re.DOTALL)
_NOT_PARAMETERS = ("optimizer.", "state.", "param_groups.", "lr_scheduler.", "train_state.")


@dataclass(frozen=True)
class _Chunk:
    box: Box
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


def open_source(path: Path) -> StoredSource:
    """Open a directory of torch.distributed.checkpoint; no code in it runs.

    Raises:
        CheckpointError: damaged, incomplete, hostile, or with what is no plain tensor.
    """
    where = path / METADATA
    data = read_small(where, _METADATA_LIMIT)
    try:
        entries = dict(
            _entries(read_pickle(data, where=where, names=_NAMES, instructions=_INSTRUCTIONS))
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: refused or damaged", found=error, mend=RESTORE) from None
    if (path / OURS).exists():
        meta, step = _read_ours(path / OURS, data)
    elif (path / SEAL).exists():
        raise CheckpointError(f"{path / OURS}: missing", mend=RESTORE)
    else:
        meta, step = _foreign(path, entries), 0
    sizes: dict[str, int] = {}
    boxes: list[StoredBox] = []
    records: list[Record] = []
    wanted: dict[str, list[tuple[LogicalTensor, Slot, _Entry, _Chunk]]] = {}
    for tensor in meta.catalog:
        for slot in slots_of(tensor, meta.slots):
            entry = entries.get(stored_name(tensor.name, slot.name)) or _moment(
                entries, tensor.name, slot.name
            )
            if entry is None or entry.shape != tensor.shape:
                raise CheckpointError(
                    f"{where}: tensor {tensor.name}, slot {slot.name}: missing or of another shape",
                    found=None if entry is None else list(entry.shape),
                    expected=list(tensor.shape),
                )
            for chunk in entry.chunks:
                wanted.setdefault(chunk.file, []).append((tensor, slot, entry, chunk))
    for file, items in wanted.items():
        with open_regular(path / file) as (_, size):
            sizes[file] = size
            for tensor, slot, entry, chunk in items:
                box, record = _locate(path, size, tensor, slot, entry, chunk)
                boxes.append(box)
                records.append(record)
    return StoredSource(
        path, meta=meta, step=step, sizes=dict(sorted(sizes.items())), boxes=boxes, records=records
    )


def _locate(
    path: Path,
    size: int,
    tensor: LogicalTensor,
    slot: Slot,
    entry: _Entry,
    chunk: _Chunk,
) -> tuple[StoredBox, Record]:
    at = f"{path / chunk.file}: tensor {tensor.name}, slot {slot.name}, box {chunk.box}"
    if chunk.start + chunk.length > size:
        raise CheckpointError(
            f"{at}: the file is truncated",
            found=f"{size} bytes",
            expected=f"at least {chunk.start + chunk.length} bytes",
            mend=RESTORE,
        )
    try:
        file = read_torch_file(
            path / chunk.file, start=chunk.start, length=chunk.length, permuted=True
        )
    except CheckpointError as error:
        raise CheckpointError(f"{at}: damaged or refused\n{error}") from None
    found = file.value
    if not isinstance(found, StoredTensor):
        raise CheckpointError(f"{at}: is no tensor", found=brief(found), mend=RESTORE)
    if found.dtype != entry.dtype or found.shape != chunk.box.shape:
        raise CheckpointError(
            f"{at}: is not what {METADATA} tells",
            found=f"shape {list(found.shape)} of {found.dtype}",
            expected=f"shape {list(chunk.box.shape)} of {entry.dtype}",
            mend=RESTORE,
        )
    [record] = [r for r in file.records if r[0] <= found.start < r[0] + max(1, r[1])]
    box = StoredBox(
        tensor.name, slot.name, chunk.box, chunk.file, found.start, found.dtype, found.axes
    )
    return box, Record(chunk.file, *record)


def _entries(metadata: Any) -> Iterator[tuple[str, _Entry]]:
    """The plain tensors of .metadata, by name (ValueError)."""
    top = _state(metadata, "Metadata")
    described, placed_at = top.get("state_dict_metadata"), top.get("storage_data")
    if not isinstance(described, dict) or not isinstance(placed_at, dict):
        raise ValueError("it has no state_dict_metadata or no storage_data")
    places: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for key, info in placed_at.items():
        index = _state(key, "MetadataIndex")
        if index.get("offset") is not None:
            place = (_text(index.get("fqn")), _size(index["offset"]))
            if place in places:
                raise ValueError(f"chunk {place} comes twice"[:300])
            places[place] = _state(info, "_StorageInfo")
    for name, told in described.items():
        if not isinstance(told, Opaque) or not told.name.endswith(".TensorStorageMetadata"):
            continue
        state = _state(told, "TensorStorageMetadata")
        properties = state.get("properties")
        kept = properties.state if isinstance(properties, Opaque) else None
        first = kept[0] if isinstance(kept, tuple) and kept else None
        dtype = _DTYPES.get(first.name) if isinstance(first, Opaque) else None
        if dtype is None:
            raise ValueError(f"tensor {brief(name)}: element type {brief(first)}")
        chunks = state.get("chunks")
        if not isinstance(chunks, list):
            raise ValueError(f"tensor {brief(name)} has no chunks")
        yield (
            _text(name),
            _Entry(
                dtype,
                _size(state.get("size")),
                tuple(_chunk(_text(name), chunk, places) for chunk in chunks),
            ),
        )


def _chunk(
    name: str, told: Any, places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]
) -> _Chunk:
    state = _state(told, "ChunkStorageMetadata")
    box = Box(_size(state.get("offsets")), _size(state.get("sizes")))
    info = places.get((name, box.offset))
    if info is None or len(box.offset) != len(box.shape):
        raise ValueError(f"tensor {name:.200}: chunk {list(box.offset)} is stored nowhere")
    if info.get("transform_descriptors"):
        raise ValueError(f"tensor {name:.200} is compressed or encrypted")
    file = _text(info.get("relative_path"))
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}", file):
        raise ValueError(f"tensor {name:.200} lies in {file[:200]!r}, no file of the directory")
    start, length = _size((info.get("offset"), info.get("length")))
    return _Chunk(box, file, start, length)


def _state(value: Any, kind: str) -> Mapping[str, Any]:
    whole = isinstance(value, Opaque) and value.name.startswith(_ROOM)
    if not whole or value.name.rpartition(".")[2] != kind or not isinstance(value.state, dict):
        raise ValueError(f"{brief(value)} is no {kind}")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    counts = isinstance(value, (tuple, list)) and len(value) <= 16
    if not counts or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"{brief(value)} is no size")
    return tuple(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 512:
        raise ValueError(f"{brief(value)} is no name")
    return value


def _moment(entries: Mapping[str, _Entry], tensor: str, slot: str) -> _Entry | None:
    return entries.get(f"state.{tensor}.{slot}")


def _foreign(path: Path, entries: Mapping[str, _Entry]) -> CheckpointMeta:
    """What a directory that is not ours tells: names, shapes, and whether it has moments."""
    tensors = tuple(
        LogicalTensor(
            name,
            entry.shape,
            tuple(f"axis{i}" for i in range(len(entry.shape))),
            Init("normal", 0.02),
            decay=len(entry.shape) > 1,
            places=(0,),
        )
        for name, entry in entries.items()
        if not name.startswith(_NOT_PARAMETERS)
    )
    if not tensors:
        raise CheckpointError(f"{path / METADATA}: has no tensor that is a parameter")
    moments = {match.groups() for name in entries if (match := _MOMENT.match(name))}
    complete = all(
        (tensor.name, slot.name) in moments for tensor in tensors for slot in ADAM_SLOTS[1:]
    )
    return CheckpointMeta(
        catalog=Catalog(tensors),
        slots=ADAM_SLOTS if complete else (MASTER,),
        layout=Layout(),
        config={},
        fingerprints={},
        run_state={},
    )


def _read_ours(path: Path, metadata: bytes) -> tuple[CheckpointMeta, int]:
    content = read_json(path, 256 << 20)
    body = content.get("body")
    if content.get("sha256") != digest(body) or not isinstance(body, dict):
        raise CheckpointError(
            f"{path}: damaged", found="another SHA-256 than it states", mend=RESTORE
        )
    if body.get("metadata_sha256") != hashlib.sha256(metadata).hexdigest():
        raise CheckpointError(
            f"{path.with_name(METADATA)}: damaged, or of another checkpoint",
            found=f"another SHA-256 than {OURS} states",
            mend=RESTORE,
        )
    try:
        meta = CheckpointMeta(
            catalog=Catalog.from_json(body["catalog"]),
            slots=tuple(Slot(**item) for item in body["slots"]),
            layout=Layout(**body["layout"]),
            config=dict(body["config"]),
            fingerprints=dict(body["fingerprints"]),
            run_state=dict(body["run_state"]),
        )
        return meta, int(body["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {brief(error)}", mend=RESTORE) from None


def _find(path: Path) -> Path | None:
    return path if (path / METADATA).is_file() else None


FORMAT = Format(
    name="dcp",
    about="torch.distributed.checkpoint with full names",
    find=_find,
    open_source=open_source,
    open_sink=DcpSink,
)
