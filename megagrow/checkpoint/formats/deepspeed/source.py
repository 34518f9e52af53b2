"""Reads checkpoints that `save_checkpoint` of DeepSpeed's engine writes: ZeRO 0 to 3, pipelines.

    <tag>/mp_rank_MM_model_states.pt                       parameters, counters, order of groups
    <tag>/zero_pp_rank_D_mp_rank_MM_model_states.pt        the same where ZeRO 3 shards parameters
    <tag>/layer_LL-model_TT-model_states.pt                parameters of a pipeline's layer
    <tag>/[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt flat partitions: masters and moments
    latest                                                 the tag

MM numbers pipeline stages and within them tensor-parallel ranks, D data-parallel ranks.  Based
on DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megagrow.checkpoint.formats.deepspeed import names
from megagrow.checkpoint.formats.deepspeed.engine_state import (
    KEY,
    EngineState,
    collected,
    dealt_out,
    left_out_of,
    read_engine,
)
from megagrow.checkpoint.formats.deepspeed.files import MODEL, Tag
from megagrow.checkpoint.formats.deepspeed.mapping import read_mapping
from megagrow.checkpoint.formats.deepspeed.scheme import (
    Scheme,
    group_order,
    mapped,
    recognised,
    with_roles,
)
from megagrow.checkpoint.formats.deepspeed.sink import DeepSpeedSink
from megagrow.checkpoint.interface.client_state import client_state
from megagrow.checkpoint.interface.format import (
    NO_OPTIONS,
    CheckpointSource,
    Format,
    LeftOut,
    ReadOptions,
)
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.one_family import require_family
from megagrow.checkpoint.interface.stored_boxes import Record, StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.io.files import laid_out
from megagrow.state.boxes import flat_offset, flat_range_boxes
from megagrow.state.catalog import Catalog
from megagrow.state.placement import PLACEHOLDER


def open_source(path: Path, options: ReadOptions = NO_OPTIONS) -> CheckpointSource:
    """Open a tag's directory or its parent.

    The model is taken from the checkpoint's client state (under the key ``megagrow``), else
    recognised from names and shapes as one of ours, else read as plain tensors under their own
    names.  A mapping file in the directory takes precedence: see `mapping`.

    Args:
        options: the family, where names and shapes fit several.

    Raises:
        CheckpointError: missing, damaged, incomplete, hostile, or split over tensor-parallel
            ranks in an unknown way.
    """
    with laid_out(path, "DeepSpeed 0.19 lays checkpoints out"):
        return _open(Tag(find(path) or path), options.family)


def _open(tag: Tag, family: str | None) -> CheckpointSource:
    client = client_state(tag.head)
    mapping = read_mapping(tag.path)
    scheme = mapped(tag, *mapping) if mapping else recognised(tag, client, family)
    config = dict(client["config"])
    if mapping and scheme.model is not None:
        require_family(scheme.model, where=str(mapping[1]), family=family)
    if scheme.model:
        config.setdefault("model", scheme.model.model_dump(mode="json", by_alias=True))
    if settings := tag.saved(0).settings:
        config.setdefault("optimizer", settings)
    if "precision" not in config and tag.precision is not None:
        config["precision"] = {"dtype": tag.precision}
    steps = tag.head.get("global_steps")
    state = dict(client["run_state"]) or {"optimizer_step": tag.optimizer_step}
    order = group_order(tag, scheme, state, mapping[0] if mapping else None)
    catalog = with_roles(tag, scheme, order)
    left_out = [*tag.left_out, *_left_out(tag, scheme)]
    if scheme.model is not None and mapping is None and "model" not in client["config"]:
        left_out.append(names.assumed_settings(scheme.model))
    if scheme.model is None:
        engine = _engine(tag, scheme, order)
        if engine is not None:
            state[KEY] = engine.to_json()
    boxes = list(_boxes(tag, scheme, catalog, order))
    used = {box.file for box in boxes}
    return StoredSource(
        tag.path,
        meta=CheckpointMeta(catalog, tag.slots, tag.layout, config, client["fingerprints"], state),
        step=client["step"]
        if client["step"] is not None
        else int(steps or tag.optimizer_step or 0),
        sizes={name: tag.files[name].size for name in sorted(used)},
        boxes=boxes,
        records=[Record(name, *record) for name in used for record in tag.files[name].records],
        left_out=left_out,
    )


def _left_out(tag: Tag, scheme: Scheme) -> Iterator[LeftOut]:
    """What the files hold and the scheme does not use."""
    for name in sorted({n for shapes in tag.shapes for n in shapes if n.startswith(PLACEHOLDER)}):
        if name not in scheme.names:
            yield LeftOut(name, "stands for a group without tensors on a pipeline stage")
    for name in sorted({name for kept in tag.buffers for name in kept} - set(scheme.names)):
        yield LeftOut(name, "a buffer that the model does not have")
    if tag.precision is None:
        yield LeftOut("the type that parameters are computed in", "no run of megagrow has it")
    for name in tag.aliases:
        if tag.aliases[name] not in scheme.names:
            yield LeftOut(name, "a further name of what is left out")
    for mp in range(tag.model_parallel):
        yield from tag.saved(mp).left_out(f"rank {mp}", tag.slots)
    yield from left_out_of(tag.saved(0), tag.head, ours=scheme.model is not None)


def _engine(
    tag: Tag, scheme: Scheme, order: Sequence[Sequence[Sequence[str]]]
) -> EngineState | None:
    """The non-tensor state of its engine, if the optimizer saved any."""
    saved = tag.saved(0)
    stages = range(0, tag.model_parallel, tag.layout.tensor)
    if not saved.groups:
        return None
    groups: list[list[str]] = [[] for _ in saved.groups]
    for mp in stages:
        for group, stored in zip(groups, tag.groups(mp) if tag.zero else order[mp], strict=True):
            if dealt_out(tag.head, tag.zero):
                stored = collected(stored, tag.layout.data)
            group += [scheme.names[name] for name in stored]
    slots = [slot.name for slot in tag.slots[1:]]
    return read_engine(saved, tag.head, groups=groups, slots=slots, zero=tag.zero)


def _boxes(
    tag: Tag, scheme: Scheme, catalog: Catalog, order: Sequence[Sequence[Sequence[str]]]
) -> Iterator[StoredBox]:
    home: dict[str, int] = {}
    for piece in tag.pieces(order):
        if piece.name not in scheme.names:  # a buffer that is left out
            continue
        name = scheme.names[piece.name]
        stage, rank = divmod(piece.mp, tag.layout.tensor)
        local = scheme.local(piece.name, catalog[name], rank)
        if home.setdefault(name, stage) != stage or (rank and not local.split):
            continue  # a replica
        if piece.offset + piece.stop - piece.start > piece.tensor.numel:
            raise tag.fault(f"{piece.tensor.path.name}: {name}, slot {piece.slot} is cut short")
        for box, _ in flat_range_boxes(local.shape, piece.start, piece.stop):
            for block, origin in local.blocks:
                kept = box.intersect(block)
                if kept is not None:
                    at = flat_offset(local.shape, kept.offset) - piece.start
                    yield StoredBox(
                        name,
                        piece.slot,
                        kept.relative_to(block.offset).moved_by(origin),
                        piece.tensor.path.name,
                        piece.tensor.start + (piece.offset + at) * piece.tensor.dtype.itemsize,
                        piece.tensor.dtype,
                    )


def find(path: Path) -> Path | None:
    """The tag's directory for a path: the path itself, or the tag that `latest` names."""
    if _is_tag(path):
        return path
    latest = path / "latest"
    if latest.is_file() and latest.stat().st_size < 1000:
        named = path / latest.read_text(errors="replace").strip()
        if named.parent == path and _is_tag(named):
            return named
    return None


def _is_tag(path: Path) -> bool:
    if not path.is_dir() or (path / "zero").is_dir():  # a universal checkpoint
        return False
    return any(MODEL.fullmatch(entry.name) for entry in path.iterdir())


FORMAT = Format(
    name="deepspeed",
    find=find,
    open_source=open_source,
    open_sink=DeepSpeedSink,
    open_with=open_source,
    told=frozenset({"family"}),
)
