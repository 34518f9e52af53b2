"""Small models saved as native checkpoints in any layout, and comparisons of checkpoints."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint import CheckpointMeta, Piece, save
from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.checkpoint.native.collective import SoloGroup
from megagrow.config import ModelConfig
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.whole_state import MemoryState
from tests.toys import random_state, toy_model

GQA: dict[str, Any] = {"family": "llama", "heads": 4, "kv_heads": 2, "head_dim": 4}


def state_of(
    model: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> MemoryState:
    return random_state(build_catalog(model), seed=seed, dtype=dtype)


ALONE = Layout()
Tensors = Mapping[tuple[str, str], torch.Tensor]  # by name and slot


def save_model(
    root: Path,
    model: ModelConfig | None = None,
    *,
    layout: Layout = ALONE,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    step: int = 7,
    fingerprints: Mapping[str, str] | None = None,
    data: Path | None = None,
    config: dict[str, Any] | None = None,
    run_state: dict[str, Any] | None = None,
) -> tuple[Path, MemoryState]:
    """Save random state of a model, split over a layout's ranks; returns (path, state).

    `config` and `run_state` are the run's, if more than the model and a step is needed.
    """
    model = model or toy_model()
    state = state_of(model, seed=seed, dtype=dtype)
    catalog = build_catalog(model)
    meta = CheckpointMeta(
        catalog=catalog,
        slots=ADAM_SLOTS,
        layout=layout,
        config=config
        or {
            "model": model.model_dump(mode="json", by_alias=True),
            "run": {"seed": 1},
            **({"data": {"path": str(data)}} if data else {}),
        },
        fingerprints=fingerprints or {"data": "d0", "tokenizer": "t0"},
        run_state=run_state
        or {"step": step, "growth_stage": 0, "rules": OptimizerRules().to_json()},
    )
    placement = Placement(catalog, layout, group_keys(catalog, OptimizerRules()))
    # One process writes what all ranks hold: to a reader the boxes are the same.
    pieces = [
        Piece(shard.tensor, slot.name, shard.box, state.read(shard.tensor, slot.name, shard.box))
        for rank in range(layout.world)
        for shard in placement.written_by(rank)
        for slot in ADAM_SLOTS
    ]
    return save(root, step=step, pieces=pieces, meta=meta, group=SoloGroup()), state


def to(source: Path, target: Path, target_format: str, **settings: Any) -> Path:
    """Convert with verification; returns the target."""
    keys = {"workers", "buffer_bytes", "moved"} & set(settings)
    run = {key: settings.pop(key) for key in keys}
    convert(Job(source, target, target_format, **settings), verify=True, **run)
    return target


def opened(path: Path) -> CheckpointSource:
    fmt, at = detect(path)
    return fmt.open_source(at)


def contents(path: Path) -> Tensors:
    """All values of a checkpoint by (tensor, slot)."""
    source = opened(path)
    return {
        (tensor.name, slot.name): source.read(tensor.name, slot.name, whole(tensor.shape))
        for tensor in source.catalog
        for slot in source.slots
    }


def assert_same(found: Tensors, wanted: Tensors, *, slots: Iterable[str] | None = None) -> None:
    """Bit for bit the same values, in the slots that are named or in all."""
    pairs = [pair for pair in wanted if slots is None or pair[1] in slots]
    assert pairs
    assert slots is not None or set(found) == set(wanted)
    for pair in pairs:
        a, b = found[pair], wanted[pair]
        assert a.dtype == b.dtype, pair
        assert torch.equal(a, b), pair
