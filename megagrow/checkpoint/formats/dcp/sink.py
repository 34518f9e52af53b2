"""Plan torch.distributed.checkpoint directories; see `source` for the format."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.containers.dcp_metadata import METADATA
from megagrow.checkpoint.containers.torch_writer import plan_archive, whole_values
from megagrow.checkpoint.interface.format import FilePlan, Late, Mark, Segment, SinkRequest, Values
from megagrow.checkpoint.interface.placed import placed
from megagrow.checkpoint.io.files import naming, write_new
from megagrow.checkpoint.native.manifest import plain
from megagrow.state.catalog import MASTER, slots_of

OURS = "megagrow.json"


def stored_name(tensor: str, slot: str) -> str:
    """A slot's name in the state dict."""
    return tensor if slot == MASTER.name else f"optimizer.state.{tensor}.{slot}"


def digest(body: Any) -> str:
    """SHA-256 of a value's JSON."""
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class DcpSink:
    """One file per rank of the layout; each box of a tensor is one chunk."""

    def __init__(self, request: SinkRequest) -> None:
        self._request = request
        self.slots = request.meta.slots
        placement = placed(request.meta.catalog, request)
        self._items: list[tuple[Values, str, int, int]] = []  # values, file, start, length
        self.files: list[FilePlan] = []
        for rank in range(request.meta.layout.world):
            name, segments, position, records = f"__{rank}_0.distcp", list[Segment](), 0, 0
            for shard in placement.written_by(rank):
                for slot in slots_of(request.meta.catalog[shard.tensor], self.slots):
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
            "slots": [slot.to_json() for slot in self.slots],
            "layout": asdict(meta.layout),
            "config": plain(meta.config, "config"),
            "fingerprints": plain(meta.fingerprints, "fingerprints"),
            "run_state": plain(meta.run_state, "run_state"),
        }
        body = json.loads(json.dumps(body))
        text = json.dumps({"sha256": digest(body), "body": body}, separators=(",", ":"))
        for name, data in ((OURS, text.encode()), (METADATA, metadata)):
            with naming(directory / name, "cannot be written"):
                write_new(directory / name, data)

    def _metadata(self) -> bytes:
        # Imported here because these modules take a second to load.
        from torch.distributed.checkpoint import metadata as m
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        described: dict[str, Any] = {}
        stored: dict[Any, Any] = {}
        catalog = self._request.meta.catalog
        for values, file, start, length in self._items:
            # A tied parameter of a foreign model has several names for the same values.
            aliases = catalog[values.tensor].aliases if values.slot == MASTER.name else ()
            for name in (stored_name(values.tensor, values.slot), *aliases):
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
    """Shift a segment's record numbers, for an archive that is not the first in its file."""
    if not isinstance(segment, Late):
        return segment
    make = segment.make
    return Late(segment.bytes, lambda checksums: make(checksums[first:]))
