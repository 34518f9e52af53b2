"""torch.distributed.checkpoint directories whose state dict has full names.

    .metadata         a pickle: shape and chunks of each name; file, first byte and length of
                      each chunk
    __R_N.distcp      chunks, each a torch.save archive
    megagrow.json     ours: what the format cannot express; other readers ignore it

Parameters are stored under their own names, Adam's moments under
`optimizer.state.<name>.<slot>`, as in torch's flattened optimizer state dicts.  For directories
that megagrow did not write see `foreign`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megagrow.checkpoint.containers.dcp_metadata import (
    METADATA,
    Chunk,
    Entry,
    locate,
    read_metadata,
)
from megagrow.checkpoint.containers.pickle_reader import brief
from megagrow.checkpoint.formats.dcp.foreign import Foreign, read_foreign
from megagrow.checkpoint.formats.dcp.sink import OURS, DcpSink, digest, stored_name
from megagrow.checkpoint.interface.accounting import account, unread_files
from megagrow.checkpoint.interface.format import Format
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.sidecar_checksums import NAME as SEAL
from megagrow.checkpoint.interface.stored_boxes import Record, StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.interface.torch_dist import is_torch_dist
from megagrow.checkpoint.io.files import (
    RESTORE,
    open_regular,
)
from megagrow.checkpoint.io.strict_json import read_json
from megagrow.errors import CheckpointError
from megagrow.state.catalog import Catalog, LogicalTensor, Slot, slots_of
from megagrow.state.layout import Layout


def open_source(path: Path) -> StoredSource:
    """Open a torch.distributed.checkpoint directory; no code in it runs.

    Raises:
        CheckpointError: damaged, incomplete, hostile, or with something other than plain tensors.
    """
    where = path / METADATA
    data, entries, others = read_metadata(where)
    if (path / OURS).exists():
        meta, step = _read_ours(path / OURS, data)
        pairs = [(t.name, slot.name) for t in meta.catalog for slot in slots_of(t, meta.slots)]
        state = Foreign(meta, {pair: stored_name(*pair) for pair in pairs})
        aliases = _require_aliases(where, state, entries)
        more = {*entries, *others} - {*state.names.values(), *aliases}
        if more:
            raise CheckpointError(
                f"{where}: tensor {min(more)[:200]}: not listed in {OURS}", fix=RESTORE
            )
    elif (path / SEAL).exists():
        raise CheckpointError(f"{path / OURS}: missing", fix=RESTORE)
    else:
        state, step, aliases = read_foreign(path, entries, others), 0, set()
    meta = state.meta
    sizes: dict[str, int] = {}
    boxes: list[StoredBox] = []
    records: list[Record] = []
    wanted: dict[str, list[tuple[LogicalTensor, Slot, Entry, Chunk]]] = {}
    for tensor in meta.catalog:
        for slot in slots_of(tensor, meta.slots):
            if (tensor.name, slot.name) in state.zeros:
                continue
            entry = entries.get(state.names[tensor.name, slot.name])
            if entry is None or entry.shape != tensor.shape:
                raise CheckpointError(
                    f"{where}: tensor {tensor.name}, slot {slot.name}: missing or misshapen",
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
    left_out = account(
        (*entries, *others),
        carried={*state.names.values(), *state.read},
        derived=aliases,
        left_out=state.left_out,
    )
    files = {chunk.file for entry in entries.values() for chunk in entry.chunks}
    return StoredSource(
        path,
        meta=meta,
        step=step,
        sizes=dict(sorted(sizes.items())),
        boxes=boxes,
        records=records,
        left_out=(*left_out, *unread_files(path, {METADATA, OURS, *files})),
        zeros=state.zeros,
    )


def _require_aliases(where: Path, state: Foreign, entries: Mapping[str, Entry]) -> set[str]:
    """The extra names of tied parameters, after checking that each refers to the same bytes.

    Raises:
        CheckpointError: one is missing, or refers to other bytes.
    """
    found = set()
    for tensor in state.meta.catalog:
        for name in tensor.aliases:
            own = entries.get(state.names[tensor.name, state.meta.slots[0].name])
            if own is None or name not in entries or entries[name].chunks != own.chunks:
                raise CheckpointError(
                    f"{where}: {name} is not {tensor.name}, with which it is tied", fix=RESTORE
                )
            found.add(name)
    return found


def _locate(
    path: Path,
    size: int,
    tensor: LogicalTensor,
    slot: Slot,
    entry: Entry,
    chunk: Chunk,
) -> tuple[StoredBox, Record]:
    at = f"{path / chunk.file}: tensor {tensor.name}, slot {slot.name}, box {chunk.box}"
    found, record = locate(path, size, entry, chunk, at=at, permuted=True)
    box = StoredBox(
        tensor.name, slot.name, chunk.box, chunk.file, found.start, found.dtype, found.axes
    )
    return box, Record(chunk.file, *record)


def _read_ours(path: Path, metadata: bytes) -> tuple[CheckpointMeta, int]:
    content = read_json(path, 256 << 20)
    body = content.get("body")
    if content.get("sha256") != digest(body) or not isinstance(body, dict):
        raise CheckpointError(
            f"{path}: damaged", found="a SHA-256 that differs from its own record", fix=RESTORE
        )
    if body.get("metadata_sha256") != hashlib.sha256(metadata).hexdigest():
        raise CheckpointError(
            f"{path.with_name(METADATA)}: damaged, or from another checkpoint",
            found=f"a SHA-256 that differs from the one in {OURS}",
            fix=RESTORE,
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
        raise CheckpointError(f"{path}: damaged: {brief(error)}", fix=RESTORE) from None


def _find(path: Path) -> Path | None:
    if is_torch_dist(path):  # Megatron's, which also has a .metadata
        return None
    return path if (path / METADATA).is_file() else None


FORMAT = Format(
    name="dcp",
    find=_find,
    open_source=open_source,
    open_sink=DcpSink,
)
