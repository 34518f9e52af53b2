"""Checkpoints of DeepSpeed's engine: what `save_checkpoint` writes, ZeRO 0 to 3, pipelines.

    <tag>/mp_rank_MM_model_states.pt                       parameters, counters, order of groups
    <tag>/zero_pp_rank_D_mp_rank_MM_model_states.pt        the same where ZeRO 3 cuts parameters
    <tag>/layer_LL-model_TT-model_states.pt                parameters of a pipeline's layer
    <tag>/[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt flat partitions: masters and moments
    latest                                                 the tag

MM counts pipeline stages and within them tensor-parallel ranks, D data-parallel ranks.  Read
from DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint import deepspeed_names as names
from megagrow.checkpoint.adapter import Format, Source
from megagrow.checkpoint.deepspeed_files import MODEL, Tag
from megagrow.checkpoint.deepspeed_sink import DeepSpeedSink
from megagrow.checkpoint.directory import RESTORE
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.stored import Record, StoredBox, StoredSource
from megagrow.errors import CheckpointError
from megagrow.growth.rules import OptimizerRules, group_keys
from megagrow.model.catalog import build_catalog
from megagrow.state.boxes import flat_range_boxes
from megagrow.state.catalog import Catalog
from megagrow.state.placement import Placement


def open_source(path: Path) -> Source:
    """Open a tag's directory, or the one above it.

    The model is the one that the checkpoint's client state tells of (under the key
    ``megagrow``), else the one of ours that names and shapes tell of, else plain tensors under
    their own names.

    Raises:
        CheckpointError: missing, damaged, incomplete, hostile, or cut over tensor-parallel ranks
            in a way that nothing tells.
    """
    try:
        return _open(Tag(find(path) or path))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not laid out as DeepSpeed 0.19 lays checkpoints out",
            found=f"{type(error).__name__}: {error}"[:300],
            mend=RESTORE,
        ) from None


def _open(tag: Tag) -> Source:
    layout, told = tag.layout, client_state(tag.head)
    last = names.last_place(name for shapes in tag.shapes for name in shapes)
    local = {
        names.logical_name(name, last) or name: shape
        for mp in reversed(range(0, tag.model_parallel, layout.tensor))
        for name, shape in tag.shapes[mp].items()
    }
    model = names.described_model(told["config"]) or names.told_model(local, tensor=layout.tensor)
    catalog = build_catalog(model) if model else None
    if catalog is None or not _fits(Placement(catalog, layout), local):
        if layout.tensor > 1:
            raise tag.fault(
                "a model that is not ours, cut over tensor-parallel ranks: which way, nothing tells"
            )
        model, last = None, -1
        whole = {n: shape for shapes in reversed(tag.shapes) for n, shape in shapes.items()}
        catalog = names.plain_catalog(whole, tag.decayed)
    config = dict(told["config"])
    if model:
        config.setdefault("model", model.model_dump(mode="json", by_alias=True))
    if tag.optimizer:
        config.setdefault("optimizer", tag.optimizer)
    steps = tag.head.get("global_steps")
    state = told["run_state"] or {"optimizer_step": tag.optimizer_step}
    boxes = list(_boxes(tag, catalog, last, state))
    used = {box.file for box in boxes}
    return StoredSource(
        tag.path,
        meta=CheckpointMeta(catalog, tag.slots, layout, config, told["fingerprints"], state),
        step=told["step"] if told["step"] is not None else int(steps or tag.optimizer_step or 0),
        sizes={name: tag.files[name].size for name in sorted(used)},
        boxes=boxes,
        records=[Record(name, *record) for name in used for record in tag.files[name].records],
    )


def client_state(head: Mapping[str, Any]) -> dict[str, Any]:
    """What our own sink (or a run's client state) left: config, run_state, fingerprints, step."""
    told = head.get(names.CLIENT)
    told = told if isinstance(told, dict) else {}
    parts = ("config", "run_state", "fingerprints")
    found = {key: told[key] if isinstance(told.get(key), dict) else {} for key in parts}
    return {**found, "step": told["step"] if type(told.get("step")) is int else None}


def _fits(placement: Placement, local: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a rank's shapes are those of a catalog."""
    catalog = placement.catalog
    return {t.name for t in catalog} == set(local) and all(
        placement.local(t, 0).shape == local[t.name] for t in catalog
    )


def _boxes(tag: Tag, catalog: Catalog, last: int, state: Mapping[str, Any]) -> Iterator[StoredBox]:
    layout = tag.layout
    placement = Placement(catalog, layout)
    home: dict[str, int] = {}
    for piece in tag.pieces(_group_order(tag, catalog, last, state)):
        name = (names.logical_name(piece.name, last) if last >= 0 else None) or piece.name
        tensor = catalog[name]
        stage, rank = divmod(piece.mp, layout.tensor)
        if home.setdefault(name, stage) != stage or (rank and not placement.is_split(tensor)):
            continue  # a replica
        if piece.offset + piece.stop - piece.start > piece.tensor.numel:
            raise tag.fault(f"{piece.tensor.path.name}: {name}, slot {piece.slot} is cut short")
        local = placement.local(tensor, rank)
        valid = local.box.relative_to(local.box.offset)
        for box, at in flat_range_boxes(local.shape, piece.start, piece.stop):
            kept = box.intersect(valid)
            if kept is not None:
                first = piece.offset + at - piece.start
                yield StoredBox(
                    name,
                    piece.slot,
                    kept.moved_by(local.box.offset),
                    piece.tensor.path.name,
                    piece.tensor.start + first * piece.tensor.dtype.itemsize,
                    piece.tensor.dtype,
                )


def _group_order(
    tag: Tag, catalog: Catalog, last: int, state: Mapping[str, Any]
) -> list[list[list[str]]]:
    """For ZeRO 0, whose files do not tell it: the names in each group of each rank's optimizer."""
    if tag.zero:
        return []
    if last < 0:  # not ours: as the module lists them, which one group at least would keep
        return [[list(shapes)] for shapes in tag.shapes]
    try:
        rules = OptimizerRules.from_json(state["rules"])
    except (KeyError, TypeError, ValueError):
        rules = OptimizerRules()
    keys = group_keys(catalog, rules)
    order = []
    for shapes in tag.shapes:
        modules = {names.logical_name(name, last): name for name in shapes}
        order.append(
            [
                [modules[t.name] for t in catalog if t.name in modules and keys[t.name] == key]
                for key in sorted(set(keys.values()))
            ]
        )
    return order


def find(path: Path) -> Path | None:
    """The tag's directory that a path means: itself, or the one that `latest` names."""
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
    about="what DeepSpeed's engine saves, ZeRO 0 to 3, pipelines",
    find=find,
    open_source=open_source,
    open_sink=DeepSpeedSink,
)
