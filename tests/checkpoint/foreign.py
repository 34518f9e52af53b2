"""Test helpers for foreign checkpoints: our sinks without the converter, and comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from megagrow.checkpoint.interface.file_writer import LEAST_BUFFER_BYTES, write_piece
from megagrow.checkpoint.interface.format import (
    CheckpointSource,
    FilePlan,
    Format,
    SinkRequest,
    cut,
)
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.io.checksum import CHUNK_BYTES
from megagrow.config import ModelConfig
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box, whole
from megagrow.state.catalog import ADAM_SLOTS, Slot
from megagrow.state.layout import Layout
from megagrow.transfer.whole_state import MemoryState


class WholeSource:
    """A whole state in memory as a source."""

    def __init__(
        self,
        model: ModelConfig,
        state: MemoryState,
        *,
        step: int = 7,
        config: dict[str, Any] | None = None,
        **run_state: Any,
    ) -> None:
        self.path, self.step, self._state = Path("memory"), step, state
        self.catalog, self.slots, self.layout = build_catalog(model), ADAM_SLOTS, Layout()
        self.config = {"model": model.model_dump(mode="json", by_alias=True)} | (config or {})
        self.run_state = {"optimizer_step": step} | run_state
        self.fingerprints = {"data": "d0"}

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        return self._state.tensors[tensor, slot].dtype

    def holds(self, tensor: str, slot: str) -> bool:
        return any(held.name == slot and held.of(self.catalog[tensor]) for held in self.slots)

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        values = self._state.view(tensor, slot, box)
        return values.clone() if out is None else out.copy_(values)


Readable: TypeAlias = CheckpointSource | WholeSource


def request_for(source: Readable, layout: Layout, **options: Any) -> SinkRequest:
    """The request that the converter would pass to a sink."""
    meta = CheckpointMeta(
        source.catalog, source.slots, layout, source.config, source.fingerprints, source.run_state
    )
    dtypes = {
        (t.name, s.name): source.dtype(t.name, s.name) for t in meta.catalog for s in meta.slots
    }
    return SinkRequest(meta=meta, step=source.step, dtypes=dtypes, **options)


def write_file(
    path: Path,
    plan: FilePlan,
    source: Readable,
    *,
    limit: int = 1 << 40,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[str]:
    """Write a planned file, cut into pieces, the last one first; returns its checksums."""
    sums = [
        write_piece(path, piece, source, buffer_bytes=LEAST_BUFFER_BYTES, chunk_bytes=chunk_bytes)
        for piece in reversed(cut(plan, limit))
    ]
    return [text for part in reversed(sums) for text in part]


def write_checkpoint(
    format: Format, source: Readable, directory: Path, layout: Layout, **options: Any
) -> Path:
    """Write what a format's sink plans; returns the directory."""
    sink = format.open_sink(request_for(source, layout, **options))
    sums = {}
    for plan in sink.files:
        path = directory / plan.name
        path.parent.mkdir(parents=True, exist_ok=True)
        sums[plan.name] = write_file(path, plan, source)
        assert path.stat().st_size == plan.bytes
    sink.conclude(directory, sums)
    return directory


def open_checkpoint(format: Format, directory: Path) -> CheckpointSource:
    """Open the checkpoint that a path refers to."""
    found = format.find(directory)
    assert found is not None, f"{format.name} finds nothing in {directory}"
    return format.open_source(found)


def differing(old: Readable, new: Readable, *, slots: Iterable[Slot] | None = None) -> str | None:
    """The first slot of a tensor that differs, bit for bit; None if all are equal."""
    names = {t.name for t in old.catalog}
    if names != {t.name for t in new.catalog}:
        return f"tensors {names ^ {t.name for t in new.catalog}}"
    for tensor in old.catalog:
        for slot in slots or old.slots:
            box = whole(new.catalog[tensor.name].shape)
            a = old.read(tensor.name, slot.name, whole(tensor.shape))
            b = new.read(tensor.name, slot.name, box)
            if a.shape != b.shape or not torch.equal(a, b):
                return f"{slot.name} of {tensor.name}"
    return None
