"""The native format for the converter: see `source` for reading, `save` for live runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagrow.checkpoint.interface.format import (
    CheckpointSource,
    FilePlan,
    Format,
    Segment,
    SinkRequest,
    Values,
)
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.model_of import optimizer_of
from megagrow.checkpoint.interface.placed import placed
from megagrow.checkpoint.io.checksum import CHUNK_BYTES
from megagrow.checkpoint.io.dtypes import DTYPE_NAMES, DTYPES
from megagrow.checkpoint.io.files import naming, write_new
from megagrow.checkpoint.native import manifest as manifests
from megagrow.checkpoint.native.manifest import file_name, file_record, stamp
from megagrow.checkpoint.native.proof import prove
from megagrow.checkpoint.native.shard_file import Part, ShardPlan, lay_out
from megagrow.checkpoint.native.source import NativeCheckpoint
from megagrow.checkpoint.native.steps import find
from megagrow.errors import CheckpointError
from megagrow.state.catalog import Slot, slots_of
from megagrow.state.optimizers import OPTIMIZERS


class NativeSink:
    """One file per rank of the layout, as a run in that layout would write it."""

    def __init__(self, request: SinkRequest) -> None:
        self._request, meta = request, request.meta
        placement = placed(meta.catalog, request)
        # A run reads its optimizer's slots; those that the source lacks start at zero.
        held = {slot.name for slot in meta.slots}
        wanted = OPTIMIZERS[optimizer_of(meta).name].slots
        self.slots = (*meta.slots, *(slot for slot in wanted if slot.name not in held))
        self._parts: list[list[Part]] = []
        self._plans: list[ShardPlan] = []
        self.files: list[FilePlan] = []
        for rank in range(meta.layout.world):
            parts = [
                Part(shard.tensor, slot.name, shard.box, DTYPE_NAMES[dtype])
                for shard in placement.written_by(rank)
                for slot in slots_of(meta.catalog[shard.tensor], self.slots)
                for dtype in (request.dtype_of(shard.tensor, slot.name),)
            ]
            parts.sort(key=lambda part: -DTYPES[part.dtype].itemsize)
            plan = lay_out(parts, stamp(save=request.nonce, step=request.step, rank=rank))
            self._parts.append(parts)
            self._plans.append(plan)
            values: list[Segment] = [
                Values(part.tensor, part.slot, part.box, DTYPES[part.dtype]) for part in parts
            ]
            self.files.append(FilePlan(file_name(rank), [plan.head, *values]))

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write the manifest."""
        files = [
            file_record(rank, parts, plan, checksums[file_name(rank)])
            for rank, (parts, plan) in enumerate(zip(self._parts, self._plans, strict=True))
        ]
        text = manifests.seal(
            _with_slots(self._request, self.slots),
            save=self._request.nonce,
            step=self._request.step,
            chunk_bytes=CHUNK_BYTES,
            files=files,
        )
        path = directory / manifests.NAME
        if len(text) > manifests.BYTES_LIMIT:
            raise CheckpointError(f"{path}: {len(text)} bytes of manifest are too many")
        prove(manifests.unseal(text, where=str(path)), where=str(path))
        with naming(path, "cannot be written"):
            write_new(path, text)


def _with_slots(request: SinkRequest, slots: Sequence[Slot]) -> CheckpointMeta:
    return dataclasses.replace(request.meta, slots=tuple(slots))


def _find(path: Path) -> Path | None:
    try:
        return find(path)
    except CheckpointError:
        return None


def _open(path: Path) -> CheckpointSource:
    return NativeCheckpoint.open(path)


FORMAT = Format(
    name="native",
    find=_find,
    open_source=_open,
    open_sink=NativeSink,
    sealed=True,
)
