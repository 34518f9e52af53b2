"""The .metadata of torch.distributed.checkpoint: a pickle that says where each tensor is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.containers.pickle_reader import Opaque, brief, read_pickle
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_reader import read_torch_file
from megagrow.checkpoint.io.dtypes import DTYPE_NAMES
from megagrow.checkpoint.io.files import RESTORE, read_small
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box

METADATA = ".metadata"
_METADATA_LIMIT = 1 << 30
_INSTRUCTIONS = 1 << 26  # a chunk of a tensor takes about 30
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
        # Megatron keeps the plans of all ranks, which say nothing more.
        *(
            f"{_ROOM}planner.{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
        ),
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


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor: a torch.save archive within a file."""

    box: Box
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the state dict."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(where: Path) -> tuple[bytes, dict[str, Entry], tuple[str, ...]]:
    """The bytes of a .metadata, its plain tensors by name, and the names of everything else.

    Raises:
        CheckpointError: damaged or hostile.
    """
    data = read_small(where, _METADATA_LIMIT)
    stated = read_pickle(data, where=where, names=_NAMES, instructions=_INSTRUCTIONS)
    try:
        entries = dict(_entries(stated))
        names = [_text(name) for name in _state(stated, "Metadata")["state_dict_metadata"]]
    except ValueError as error:
        raise CheckpointError(f"{where}: refused or damaged", found=error, fix=RESTORE) from None
    return data, entries, tuple(name for name in names if name not in entries)


def _entries(metadata: Any) -> Iterator[tuple[str, Entry]]:
    """The plain tensors of .metadata, by name (raises ValueError)."""
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
    for name, stated in described.items():
        if not isinstance(stated, Opaque) or not stated.name.endswith(".TensorStorageMetadata"):
            continue
        state = _state(stated, "TensorStorageMetadata")
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
            Entry(
                dtype,
                _size(state.get("size")),
                tuple(_chunk(_text(name), chunk, places) for chunk in chunks),
            ),
        )


def _chunk(
    name: str, stated: Any, places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]
) -> Chunk:
    state = _state(stated, "ChunkStorageMetadata")
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
    return Chunk(box, file, start, length)


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


def locate(
    path: Path, size: int, entry: Entry, chunk: Chunk, *, at: str, permuted: bool = False
) -> tuple[StoredTensor, tuple[int, int, int]]:
    """Find a chunk's values in its file: the tensor, and (first byte, bytes, CRC-32) of its record.

    Args:
        path: the checkpoint's directory.
        size: of the chunk's file.
        at: what is read, for errors.
        permuted: whether it may have an order of axes other than row-major.

    Raises:
        CheckpointError: the file is truncated or damaged, or holds something else.
    """
    if chunk.start + chunk.length > size:
        raise CheckpointError(
            f"{at}: the file is truncated",
            found=f"{size} bytes",
            expected=f"at least {chunk.start + chunk.length} bytes",
            fix=RESTORE,
        )
    try:
        file = read_torch_file(
            path / chunk.file, start=chunk.start, length=chunk.length, permuted=permuted
        )
    except CheckpointError as error:
        raise CheckpointError(f"{at}: damaged or refused\n{error}") from None
    found = file.value
    if not isinstance(found, StoredTensor):
        raise CheckpointError(f"{at}: is no tensor", found=brief(found), fix=RESTORE)
    if found.dtype != entry.dtype or found.shape != chunk.box.shape:
        raise CheckpointError(
            f"{at}: is not what {METADATA} tells",
            found=f"shape {list(found.shape)} of {found.dtype}",
            expected=f"shape {list(chunk.box.shape)} of {entry.dtype}",
            fix=RESTORE,
        )
    [record] = [r for r in file.records if r[0] <= found.start < r[0] + max(1, r[1])]
    return found, record
