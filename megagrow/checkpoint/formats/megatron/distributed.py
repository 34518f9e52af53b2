"""Reads Megatron-Core's distributed checkpoints (`--ckpt-format torch_dist`, its default).

    metadata.json     the kind of format, `sharded_backend`
    common.pt         what all ranks share: arguments, iteration, the optimizer's hyperparameters
    .metadata         shape and chunks of each tensor, as torch.distributed.checkpoint writes it
    __R_N.distcp      the chunks, each a torch.save archive

Names are Megatron-Core's. Layers that are all alike are one tensor, with the layers as its first
axis (`decoder.layers.self_attention.linear_qkv.weight`); others have the layer's number in their
names.  A SwiGLU input is [gate; up] as a whole, unlike in the classic files.  Tensors are whole:
the layout of the run that wrote them shows in the chunks alone.

Moments are under `optimizer.state.exp_avg.NAME` if the optimizer is Adam on whole parameters, or
the distributed optimizer in its form `fully_reshardable`, with its masters.  Its other
forms (`dp_reshardable`, `dp_zero_gather_scatter`) hold flat buckets of one layout; of those the
weights alone are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.containers.dcp_metadata import (
    METADATA,
    Entry,
    locate,
    read_metadata,
)
from megagrow.checkpoint.containers.pickle_reader import Opaque
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_reader import read_torch_file
from megagrow.checkpoint.formats.megatron import names
from megagrow.checkpoint.interface.accounting import unread_files
from megagrow.checkpoint.interface.format import LeftOut, ReadOptions
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.stored_boxes import Record, StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.interface.torch_dist import METADATA as KIND
from megagrow.checkpoint.io.files import RESTORE, open_regular
from megagrow.checkpoint.io.strict_json import read_json
from megagrow.errors import CheckpointError
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box, flat_range_boxes
from megagrow.state.catalog import ADAM_SLOTS, MASTER, Catalog, LogicalTensor
from megagrow.state.layout import Layout

COMMON = "common.pt"
_STACKED = re.compile(r"((?:decoder|encoder|transformer)\.layers)\.(\D.*)", re.DOTALL)
_STATE = re.compile(r"optimizer\.state\.([a-z0-9_]+?)\.(.+)", re.DOTALL)
# Slots by the names that the 16-bit optimizer and the distributed one give them.
_SLOTS = {"fp32_param": MASTER.name, "param": MASTER.name}
_SLOTS |= {slot.name: slot.name for slot in ADAM_SLOTS[1:]}
_MOMENTS = frozenset(slot.name for slot in ADAM_SLOTS[1:])
_OBJECTS = {
    "_extra_state": "extra state of a module, which holds no parameters",
    "rng_state": "random states: a run of megagrow derives its own",
    "optimizer.": "the optimizer's own description of its state",
}
_OF_COMMON = {
    "opt_param_scheduler": "the learning-rate schedule: it is in a run's configuration",
    "lr_scheduler": "the learning-rate schedule: it is in a run's configuration",
    "optimizer": "optimizer hyperparameters: they are in a run's configuration",
    "content_metadata": "how it was saved",
}
_READ = frozenset({"args", "iteration", "checkpoint_version"})


def open_distributed(path: Path, options: ReadOptions) -> StoredSource:
    """Open an iteration's directory; no code in it runs.

    Args:
        options: as for the classic format.

    Raises:
        CheckpointError: damaged, incomplete, hostile, of another backend, or of a foreign model.
    """
    kind = read_json(path / KIND).get("sharded_backend")
    if kind != "torch_dist":
        raise CheckpointError(
            f"{path}: is in a distributed format of Megatron that is not read",
            found=f"sharded_backend {str(kind)[:80]!r} in {KIND}",
            expected="torch_dist",
            fix="save it with --ckpt-format torch_dist, or with --ckpt-format torch",
        )
    where = path / COMMON
    common = read_torch_file(where).value
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, Opaque) or not isinstance(args.state, dict):
        raise CheckpointError(f"{where}: has no `args`, so the model is unknown", fix=RESTORE)
    model, padded, left_out = names.read_model(args.state, where=str(where), options=options)
    catalog = build_catalog(model)
    _, entries, objects = read_metadata(path / METADATA)
    stored = _by_slot(path, catalog, entries)
    moments, why = _moments(stored, common)
    values = _Values(path, catalog, padded)
    carried: set[str] = set()
    for key, name in stored[MASTER.name].items():
        slots = {MASTER.name: name}
        if moments:
            slots |= {slot: stored[slot][key] for slot in _MOMENTS}
        for slot, of_slot in slots.items():
            values.add(key, entries[of_slot], slot)
            carried.add(of_slot)
    for name in sorted(set(entries) - carried):
        state = name.startswith("optimizer.")
        left_out.append(LeftOut(name, why if state else "a rounded copy of the master"))
    left_out += [LeftOut(name, _of_object(name)) for name in objects]
    for key in set(common) - _READ:
        left_out.append(
            LeftOut(f"{COMMON}: {key}", _OF_COMMON.get(str(key), "megagrow has no equivalent"))
        )
    iteration, consumed = common.get("iteration"), args.state.get("consumed_train_samples")
    step = iteration if type(iteration) is int and iteration >= 0 else 0
    updates = _updates(common) if moments else step
    if updates is None:
        updates = step
        left_out.append(LeftOut("the optimizer's count of updates", f"not stored: {step} is taken"))
    run_state = {
        "optimizer_step": updates,
        **({"consumed_samples": consumed} if isinstance(consumed, int) else {}),
    }
    config = {"model": model.model_dump(mode="json", by_alias=True)}
    slots_held = ADAM_SLOTS if moments else (MASTER,)
    files = {chunk.file for entry in entries.values() for chunk in entry.chunks}
    return StoredSource(
        path,
        meta=CheckpointMeta(catalog, slots_held, _layout(args.state), config, {}, run_state),
        step=step,
        sizes=dict(sorted(values.sizes.items())),
        boxes=values.boxes,
        records=values.records,
        left_out=(*left_out, *unread_files(path, {METADATA, KIND, COMMON, *files})),
    )


# --- names --------------------------------------------------------------------------------


def _by_slot(
    path: Path, catalog: Catalog, entries: Mapping[str, Entry]
) -> dict[str, dict[str, str]]:
    """By slot, the stored name of each of the model's names; masters come before parameters.

    Raises:
        CheckpointError: a tensor is no parameter of the model, and no state of one.
    """
    found: dict[str, dict[str, str]] = {slot.name: {} for slot in ADAM_SLOTS}
    for name in entries:
        if not name.startswith("optimizer."):
            _members(path, catalog, name)
            found[MASTER.name][name] = name
    for name in entries:
        match = _STATE.fullmatch(name)
        if match and match[1] in _SLOTS and match[2] in found[MASTER.name]:
            found[_SLOTS[match[1]]][match[2]] = name
    return found


def _members(path: Path, catalog: Catalog, key: str) -> list[LogicalTensor]:
    """The tensors that a stored name holds: one, or that of every layer."""
    match = _STACKED.fullmatch(key)
    numbered = [key]
    if match:
        layers = {tensor.layer for tensor in catalog} - {None}
        numbered = [f"{match[1]}.{layer}.{match[2]}" for layer in range(len(layers))]
    ours = [names.logical_name(name, 0) for name in numbered]
    if not all(name is not None and name in catalog for name in ours):
        raise CheckpointError(f"{path / METADATA}: {key[:200]}: not in the model of its args")
    return [catalog[name] for name in ours if name is not None]


def _moments(
    stored: Mapping[str, Mapping[str, str]], common: Mapping[str, Any]
) -> tuple[bool, str]:
    """Whether every parameter has moments, and why optimizer state is not carried."""
    wanted = set(stored[MASTER.name])
    if all(set(stored[slot]) == wanted for slot in _MOMENTS):
        return True, "a slot that Adam does not have"
    optimizer = common.get("optimizer")
    form = optimizer.get("param_state_sharding_type") if isinstance(optimizer, dict) else None
    if isinstance(form, str) and form != "fully_reshardable":
        return False, (
            f"the distributed optimizer's state as {form[:80]}: flat buckets of one layout, which "
            "are not read; weights alone are. --dist-ckpt-optim-fully-reshardable saves it readably"
        )
    counts = [len(stored[slot]) for slot in sorted(_MOMENTS)]
    return False, f"not both moments of each of {len(wanted)} parameters, but {counts}"


def _updates(common: Mapping[str, Any]) -> int | None:
    """The optimizer's count of updates: for all parameters, or by group; None if there is none."""
    outer = common.get("optimizer")
    for part in (outer, outer.get("optimizer") if isinstance(outer, dict) else None):
        if not isinstance(part, dict):
            continue
        state, groups = part.get("state"), part.get("param_groups")
        found = [state.get("common_step")] if isinstance(state, dict) else []
        if isinstance(groups, list):
            found += [group.get("step") for group in groups if isinstance(group, dict)]
        numbers = [n.item() if isinstance(n, StoredTensor) else n for n in found if n is not None]
        counts = [int(n) for n in numbers if isinstance(n, (int, float)) and n >= 0]
        if counts:
            return max(counts)
    return None


def _of_object(name: str) -> str:
    return next((why for part, why in _OBJECTS.items() if part in name), "no tensor")


def _layout(args: Mapping[str, Any]) -> Layout:
    """The layout of the run that wrote it."""
    sizes = [args.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    tensor, pipeline = (n if type(n) is int and n > 0 else 1 for n in sizes)
    return Layout(tensor=tensor, pipeline=pipeline)


# --- values -------------------------------------------------------------------------------


class _Values:
    """Makes boxes of logical tensors from chunks of stored ones."""

    def __init__(self, path: Path, catalog: Catalog, padded: int) -> None:
        self._path, self._catalog, self._padded = path, catalog, padded
        self.boxes: list[StoredBox] = []
        self.records: list[Record] = []
        self.sizes: dict[str, int] = {}

    def add(self, key: str, entry: Entry, slot: str) -> None:
        """Add a stored tensor as a slot of what it holds.

        Raises:
            CheckpointError: it is misshapen, damaged, or cut in a way that no layout cuts.
        """
        members = _members(self._path, self._catalog, key)
        stacked = bool(_STACKED.fullmatch(key))
        at = f"{self._path / METADATA}: {key[:200]}, slot {slot}"
        _, one = names.local_part(members[0], Layout(), 0, self._padded)
        expected = (len(members), *one) if stacked else one
        if entry.shape != expected:
            raise CheckpointError(
                f"{at}: shape", found=list(entry.shape), expected=list(expected), fix=RESTORE
            )
        for chunk in entry.chunks:
            if chunk.file not in self.sizes:
                with open_regular(self._path / chunk.file) as (_, size):
                    self.sizes[chunk.file] = size
            size = self.sizes[chunk.file]
            where = f"{self._path / chunk.file}: {key[:200]}, slot {slot}, box {chunk.box}"
            found, record = locate(self._path, size, entry, chunk, at=where)
            self.records.append(Record(chunk.file, *record))
            first, count = (chunk.box.offset[0], chunk.box.shape[0]) if stacked else (0, 1)
            offset = chunk.box.offset[stacked:]
            shape = chunk.box.shape[stacked:]
            for number, member in enumerate(members[first : first + count]):
                start = found.start + number * math.prod(shape) * found.dtype.itemsize
                for box, after in _boxes(member, offset, shape, at=where):
                    at_byte = start + after * found.dtype.itemsize
                    self.boxes.append(
                        StoredBox(member.name, slot, box, chunk.file, at_byte, found.dtype)
                    )


def _boxes(
    tensor: LogicalTensor, offset: tuple[int, ...], shape: tuple[int, ...], *, at: str
) -> Iterator[tuple[Box, int]]:
    """The boxes of a part of the stored matrix or vector, each with its first element's number.

    The stored rows are the tensor's leading axes, and its columns the others. Rows beyond the
    tensor's are padding of the vocabulary.

    Raises:
        CheckpointError: the columns are no box of the tensor.
    """
    split = 1 if tensor.axes[0] == "embed" else len(tensor.shape) - 1
    lead, trail = tensor.shape[:split], tensor.shape[split:]
    if len(offset) == 1:
        lead, trail = tensor.shape, ()
    width = shape[1] if len(shape) == 2 else 1
    column = offset[1] if len(offset) == 2 else 0
    columns = [box for box, _ in flat_range_boxes(trail, column, column + width)]
    if len(columns) != 1:
        raise CheckpointError(
            f"{at}: is cut inside a head", expected="parts of whole heads", fix=RESTORE
        )
    stop = min(offset[0] + shape[0], math.prod(lead))
    for rows, position in flat_range_boxes(lead, offset[0], stop):
        box = Box(rows.offset + columns[0].offset, rows.shape + columns[0].shape)
        yield box, (position - offset[0]) * width
