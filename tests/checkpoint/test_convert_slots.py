"""A native result has the slots of its run's optimizer, and no others."""

import json

import pytest

from megagrow.checkpoint import CheckpointMeta, Piece, save
from megagrow.errors import CheckpointError
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import slots_of
from megagrow.state.layout import Layout
from megagrow.state.optimizers import OPTIMIZERS
from megagrow.state.placement import Placement
from tests.checkpoint.states import contents, opened, to
from tests.checkpoint.worlds import SoloGroup
from tests.toys import random_state, toy_model


def saved(root, kind, slots):
    """A native single-rank checkpoint of a run with an optimizer, with some of its slots."""
    model = toy_model()
    catalog = build_catalog(model)
    state = random_state(catalog, seed=3)
    meta = CheckpointMeta(
        catalog=catalog,
        slots=slots,
        layout=Layout(),
        config={
            "model": model.model_dump(mode="json", by_alias=True),
            "optimizer": {"name": kind.name},
        },
        fingerprints={},
        run_state={"step": 7, "growth_stage": 0, "rules": OptimizerRules().to_json()},
    )
    placement = Placement(catalog, Layout(), group_keys(catalog, OptimizerRules(), kind))
    pieces = [
        Piece(shard.tensor, slot.name, shard.box, state.read(shard.tensor, slot.name, shard.box))
        for shard in placement.written_by(0)
        for slot in slots_of(catalog[shard.tensor], slots)
    ]
    return save(root, step=7, pieces=pieces, meta=meta, group=SoloGroup())


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_laid_out_anew_gains_no_slot(tmp_path, kind):
    source = opened(saved(tmp_path / "old", kind, kind.slots))
    result = opened(to(source.path, tmp_path / "new", "native", layout=Layout(data=2, zero=1)))
    assert result.slots == kind.slots
    pairs = {(t.name, slot.name) for t in source.catalog for slot in slots_of(t, kind.slots)}
    body = json.loads((result.path / "manifest.json").read_text())["body"]
    entries = [entry for file in body["files"] for entry in file["entries"]]
    assert {(entry["tensor"], entry["slot"]) for entry in entries} == pairs


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_alone_get_the_slots_that_their_run_reads(tmp_path, kind):
    path = saved(tmp_path / "old", kind, kind.slots[:1])
    result = opened(to(path, tmp_path / "new", "native"))
    assert result.slots == kind.slots
    for (_, slot), values in (contents(result.path) if kind.name != "muon" else {}).items():
        assert slot == "master" or not values.any()


@pytest.mark.parametrize("target", ["deepspeed", "universal"])
def test_deepspeed_gets_the_slots_of_the_runs_optimizer(tmp_path, target):
    kind = OPTIMIZERS["lion"]
    source = opened(saved(tmp_path / "old", kind, kind.slots))
    result = opened(to(source.path, tmp_path / "new", target))
    assert [slot.name for slot in result.slots] == ["master", "exp_avg"]
    expected = contents(source.path)
    found = contents(result.path)
    assert set(found) == set(expected)
    assert all((found[key] == expected[key].float()).all() for key in expected)


def test_a_slot_of_some_tensors_is_not_made_up_for_the_others(tmp_path):
    kind = OPTIMIZERS["muon"]
    path = saved(tmp_path / "old", kind, kind.slots)
    with pytest.raises(CheckpointError, match=r"no exp_avg_sq \(optimizer muon\)"):
        to(path, tmp_path / "new", "deepspeed")
