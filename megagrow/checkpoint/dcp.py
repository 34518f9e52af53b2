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
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.adapter import FilePlan, Format, Late, Mark, Request, Segment, Values
from megagrow.checkpoint.archive import plan_archive, whole_values
from megagrow.checkpoint.directory import (
    READING,
    RESTORE,
    naming,
    open_regular,
    read_small,
    write_new,
)
from megagrow.checkpoint.inert import Inert, Name, brief, read_inert
from megagrow.checkpoint.manifest import CheckpointMeta, plain
from megagrow.checkpoint.native_sink import placed
from megagrow.checkpoint.safetensors import read_json
from megagrow.checkpoint.shards import DTYPE_NAMES
from megagrow.checkpoint.stored import Record, StoredBox, StoredSource
from megagrow.checkpoint.torcharchive import find_tensor
from megagrow.errors import CheckpointError
from megagrow.layout import Layout
from megagrow.state.boxes import Box
from megagrow.state.catalog import ADAM_SLOTS, MASTER, Catalog, Init, LogicalTensor, Slot

_METADATA, _OURS = ".metadata", "megagrow.json"
_METADATA_LIMIT = 1 << 30
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


def stored_name(tensor: str, slot: str) -> str:
    """The name of a slot of a tensor in the state dict."""
    return tensor if slot == MASTER.name else f"optimizer.state.{tensor}.{slot}"


# --- reading ------------------------------------------------------------------------------


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
    where = path / _METADATA
    data = read_small(where, _METADATA_LIMIT)
    try:
        entries = dict(_entries(read_inert(data, _NAMES)))
    except ValueError as error:
        raise CheckpointError(f"{where}: refused or damaged", found=error, mend=RESTORE) from None
    if (path / _OURS).exists():
        meta, step = _read_ours(path / _OURS, data)
    else:
        meta, step = _foreign(path, entries), 0
    sizes: dict[str, int] = {}
    boxes: list[StoredBox] = []
    records: list[Record] = []
    wanted: dict[str, list[tuple[LogicalTensor, Slot, _Entry, _Chunk]]] = {}
    for tensor in meta.catalog:
        for slot in meta.slots:
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
        with open_regular(path / file) as (descriptor, size):
            sizes[file] = size
            for tensor, slot, entry, chunk in items:
                box, record = _locate(path, descriptor, size, tensor, slot, entry, chunk)
                boxes.append(box)
                records.append(record)
    return StoredSource(
        path, meta=meta, step=step, sizes=dict(sorted(sizes.items())), boxes=boxes, records=records
    )


def _locate(
    path: Path,
    descriptor: int,
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
        with naming(path / chunk.file, "cannot be read", READING):
            found = find_tensor(descriptor, chunk.start, chunk.length)
    except ValueError as error:
        raise CheckpointError(f"{at}: damaged or refused", found=error, mend=RESTORE) from None
    if found.dtype != entry.dtype or found.shape != chunk.box.shape:
        raise CheckpointError(
            f"{at}: is not what {_METADATA} tells",
            found=f"shape {list(found.shape)} of {found.dtype}",
            expected=f"shape {list(chunk.box.shape)} of {entry.dtype}",
            mend=RESTORE,
        )
    start = chunk.start + found.start
    return (
        StoredBox(tensor.name, slot.name, chunk.box, chunk.file, start, found.dtype, found.axes),
        Record(chunk.file, start, found.bytes, found.crc32),
    )


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
        if not isinstance(told, Inert) or not told.name.endswith(".TensorStorageMetadata"):
            continue
        state = _state(told, "TensorStorageMetadata")
        properties = state.get("properties")
        kept = properties.state if isinstance(properties, Inert) else None
        first = kept[0] if isinstance(kept, tuple) and kept else None
        dtype = _DTYPES.get(first.name) if isinstance(first, Name) else None
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
    whole = isinstance(value, Inert) and value.name.startswith(_ROOM)
    if not whole or value.name.rpartition(".")[2] != kind or not isinstance(value.state, dict):
        raise ValueError(f"{brief(value)} is no {kind}")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    if isinstance(value, Inert) and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
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
        raise CheckpointError(f"{path / _METADATA}: has no tensor that is a parameter")
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
    if content.get("sha256") != _digest(body) or not isinstance(body, dict):
        raise CheckpointError(
            f"{path}: damaged", found="another SHA-256 than it states", mend=RESTORE
        )
    if body.get("metadata_sha256") != hashlib.sha256(metadata).hexdigest():
        raise CheckpointError(
            f"{path.with_name(_METADATA)}: damaged, or of another checkpoint",
            found=f"another SHA-256 than {_OURS} states",
            mend=RESTORE,
        )
    try:
        meta = CheckpointMeta(
            catalog=Catalog.from_json(body["catalog"]),
            slots=tuple(Slot(item["name"], item["kind"]) for item in body["slots"]),
            layout=Layout(**body["layout"]),
            config=dict(body["config"]),
            fingerprints=dict(body["fingerprints"]),
            run_state=dict(body["run_state"]),
        )
        return meta, int(body["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {brief(error)}", mend=RESTORE) from None


def _digest(body: Any) -> str:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- writing ------------------------------------------------------------------------------


class DcpSink:
    """A file a rank of the layout; each box of a tensor is one chunk."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.slots = request.meta.slots
        placement = placed(request.meta.catalog, request)
        self._items: list[tuple[Values, str, int, int]] = []  # values, file, start, length
        self.files: list[FilePlan] = []
        for rank in range(request.meta.layout.world):
            name, segments, position, records = f"__{rank}_0.distcp", list[Segment](), 0, 0
            for shard in placement.written_by(rank):
                for slot in self.slots:
                    dtype = request.dtype_of(shard.tensor, slot.name)
                    values = Values(shard.tensor, slot.name, shard.box, dtype)
                    archive = plan_archive("archive", whole_values(values))
                    self._items.append((values, name, position, archive.bytes))
                    segments += (_counting_from(records, s) for s in archive.segments)
                    position += archive.bytes
                    records += sum(isinstance(s, Mark) for s in archive.segments)
            if segments:
                self.files.append(FilePlan(name, segments))

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write .metadata and megagrow.json."""
        metadata = self._metadata()
        meta = self._request.meta
        body = {
            "format": "megagrow torch.distributed.checkpoint",
            "version": 1,
            "metadata_sha256": hashlib.sha256(metadata).hexdigest(),
            "step": self._request.step,
            "catalog": meta.catalog.to_json(),
            "slots": [asdict(slot) for slot in self.slots],
            "layout": asdict(meta.layout),
            "config": plain(meta.config, "config"),
            "fingerprints": plain(meta.fingerprints, "fingerprints"),
            "run_state": plain(meta.run_state, "run_state"),
        }
        body = json.loads(json.dumps(body))
        text = json.dumps({"sha256": _digest(body), "body": body}, separators=(",", ":"))
        for name, data in ((_OURS, text.encode()), (_METADATA, metadata)):
            with naming(directory / name, "cannot be written"):
                write_new(directory / name, data)

    def _metadata(self) -> bytes:
        # Only here: these modules take a second to import.
        from torch.distributed.checkpoint import metadata as m
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        described: dict[str, Any] = {}
        stored: dict[Any, Any] = {}
        catalog = self._request.meta.catalog
        for values, file, start, length in self._items:
            name = stored_name(values.tensor, values.slot)
            if name not in described:
                described[name] = m.TensorStorageMetadata(
                    properties=m.TensorProperties(dtype=values.dtype),
                    size=torch.Size(catalog[values.tensor].shape),
                    chunks=[],
                )
            chunks = described[name].chunks
            offset = torch.Size(values.box.offset)
            chunks.append(m.ChunkStorageMetadata(offset, torch.Size(values.box.shape)))
            index = m.MetadataIndex(name, offset, index=len(chunks) - 1)
            stored[index] = _StorageInfo(relative_path=file, offset=start, length=length)
        return pickle.dumps(
            m.Metadata(
                state_dict_metadata=described,
                planner_data={name: (name,) for name in described},
                storage_data=stored,
                storage_meta=m.StorageMeta(),
            )
        )


def _counting_from(first: int, segment: Segment) -> Segment:
    """A segment of an archive whose records are not the first of their file."""
    if not isinstance(segment, Late):
        return segment
    make = segment.make
    return Late(segment.bytes, lambda checksums: make(checksums[first:]))


def _find(path: Path) -> Path | None:
    return path if (path / _METADATA).is_file() else None


FORMAT = Format(
    name="dcp",
    about="torch.distributed.checkpoint with full names",
    find=_find,
    open_source=open_source,
    open_sink=DcpSink,
)
