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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint import deepspeed_names as names
from megagrow.checkpoint.adapter import Format, Source
from megagrow.checkpoint.deepspeed_files import MODEL, Tag
from megagrow.checkpoint.deepspeed_mapping import NAME as MAPPING
from megagrow.checkpoint.deepspeed_mapping import (
    Local,
    MappingFile,
    local_of,
    local_of_ours,
    local_of_placement,
    read_mapping,
    rules_for,
    whole_shape,
)
from megagrow.checkpoint.deepspeed_sink import DeepSpeedSink
from megagrow.checkpoint.directory import laid_out
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.shape import replayed_model
from megagrow.checkpoint.stored import Record, StoredBox, StoredSource
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.growth.rules import OptimizerRules, group_keys
from megagrow.layout import Layout
from megagrow.model.catalog import build_catalog
from megagrow.state.boxes import flat_offset, flat_range_boxes
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.placement import Placement


def open_source(path: Path) -> Source:
    """Open a tag's directory, or the one above it.

    The model is the one that the checkpoint's client state tells of (under the key
    ``megagrow``), else the one of ours that names and shapes tell of, else plain tensors under
    their own names.  A mapping file beside the files settles it: see `deepspeed_mapping`.

    Raises:
        CheckpointError: missing, damaged, incomplete, hostile, or cut over tensor-parallel ranks
            in a way that nothing tells.
    """
    with laid_out(path, "DeepSpeed 0.19 lays checkpoints out"):
        return _open(Tag(find(path) or path))


@dataclass(frozen=True)
class _Scheme:
    """What the parameters of a checkpoint are.

    Attributes:
        names: stored name to the tensor's.
        local: a tensor-parallel rank's part: (stored name, tensor, rank) to `Local`.
        last: the head's place in the layer list of a model of ours, else -1.
    """

    model: ModelConfig | None
    catalog: Catalog
    names: Mapping[str, str]
    local: Callable[[str, LogicalTensor, int], Local]
    last: int


def _open(tag: Tag) -> Source:
    told = client_state(tag.head)
    mapping = read_mapping(tag.path)
    scheme = _mapped(tag, *mapping) if mapping else _recognised(tag, told)
    config = dict(told["config"])
    if scheme.model:
        config.setdefault("model", scheme.model.model_dump(mode="json", by_alias=True))
    if tag.optimizer:
        config.setdefault("optimizer", tag.optimizer)
    steps = tag.head.get("global_steps")
    state = told["run_state"] or {"optimizer_step": tag.optimizer_step}
    boxes = list(_boxes(tag, scheme, state))
    used = {box.file for box in boxes}
    meta = CheckpointMeta(
        scheme.catalog, tag.slots, tag.layout, config, told["fingerprints"], state
    )
    return StoredSource(
        tag.path,
        meta=meta,
        step=told["step"] if told["step"] is not None else int(steps or tag.optimizer_step or 0),
        sizes={name: tag.files[name].size for name in sorted(used)},
        boxes=boxes,
        records=[Record(name, *record) for name in used for record in tag.files[name].records],
    )


def _recognised(tag: Tag, told: Mapping[str, Any]) -> _Scheme:
    """A model of ours by the configuration or by names and shapes, else plain tensors."""
    layout = tag.layout
    last = names.last_place(name for shapes in tag.shapes for name in shapes)
    local = {
        names.logical_name(name, last) or name: shape
        for mp in reversed(range(0, tag.model_parallel, layout.tensor))
        for name, shape in tag.shapes[mp].items()
    }
    written = replayed_model(
        told["config"], told["run_state"], vocabulary=_vocabulary(tag, local, layout)
    )
    model = written or names.recognised_model(local, tensor=layout.tensor)
    placement = Placement(build_catalog(model), layout) if model else None
    if placement is not None and _fits(placement, local):
        ours = placement
        logical = {n: names.logical_name(n, last) or n for shapes in tag.shapes for n in shapes}
        return _Scheme(
            model, ours.catalog, logical, lambda _, t, rank: local_of_placement(ours, t, rank), last
        )
    if written is not None:
        raise CheckpointError(
            f"{tag.path}: its client state describes another model than its parameters are",
            found=f"{len(local)} parameters",
            expected=f"{len(build_catalog(written))}, for layout {layout}",
        )
    if layout.tensor > 1:
        raise CheckpointError(
            f"{tag.path}: a model that is not ours, cut over tensor-parallel ranks: which way, "
            "nothing tells",
            mend=f"tell it in a file {MAPPING} beside the files: see docs/formats.md",
        )
    whole = {n: shape for shapes in reversed(tag.shapes) for n, shape in shapes.items()}
    plain = Placement(names.plain_catalog(whole, tag.decayed), layout)
    same = {name: name for name in whole}
    return _Scheme(
        None, plain.catalog, same, lambda _, t, rank: local_of_placement(plain, t, rank), -1
    )


def _vocabulary(tag: Tag, local: Mapping[str, tuple[int, ...]], layout: Layout) -> int | None:
    """The rows of the token table without padding, where anything tells."""
    merging = tag.head.get("universal_checkpoint_info")
    rows = merging.get("original_vocab_size") if isinstance(merging, dict) else None
    if type(rows) is int and rows > 0:
        return rows
    table = local.get("embedding.token")
    return table[0] * layout.tensor if table else None


def _mapped(tag: Tag, mapping: MappingFile, where: Path) -> _Scheme:
    """What a person tells of it."""
    layout = tag.layout
    stored = {n: shape for shapes in reversed(tag.shapes) for n, shape in shapes.items()}
    rules = rules_for(mapping, list(stored), where=where, tensor=layout.tensor)
    logical = {name: to for name, (to, _) in rules.items()}
    if mapping.model is None:
        whole = {
            logical[n]: whole_shape(rules[n][1], s, tensor=layout.tensor, at=f"{where}: {n}")
            for n, s in stored.items()
        }
        catalog = names.plain_catalog(whole, {logical[n]: d for n, d in tag.decayed.items()})
        return _Scheme(
            None,
            catalog,
            logical,
            lambda n, t, rank: local_of(t, rules[n][1], stored[n], rank, layout),
            -1,
        )
    placement = Placement(build_catalog(mapping.model), layout)
    odd = {t.name for t in placement.catalog} ^ set(logical.values())
    if odd:
        name = sorted(odd)[0]
        absent = name in placement.catalog
        raise CheckpointError(
            f"{where}: tensor {name}: "
            + ("no parameter is mapped to it" if absent else "the model has none of that name")
        )

    def local(name: str, tensor: LogicalTensor, rank: int) -> Local:
        found = local_of_ours(placement, tensor, stored[name], rank)
        if found is None:
            raise CheckpointError(
                f"{where}: parameter {name}, mapped to {tensor.name}: shape",
                found=list(stored[name]),
                expected=f"{list(placement.local(tensor, rank).shape)}, in any grouping of axes",
            )
        return found

    return _Scheme(mapping.model, placement.catalog, logical, local, -1)


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


def _boxes(tag: Tag, scheme: _Scheme, state: Mapping[str, Any]) -> Iterator[StoredBox]:
    home: dict[str, int] = {}
    order = _group_order(tag, scheme.catalog, scheme.last, state)
    for piece in tag.pieces(order):
        name = scheme.names[piece.name]
        stage, rank = divmod(piece.mp, tag.layout.tensor)
        local = scheme.local(piece.name, scheme.catalog[name], rank)
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
