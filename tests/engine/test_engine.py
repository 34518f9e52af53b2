"""Law 1 under DeepSpeed: a run in any data-parallel layout equals the run of one process."""

import math

import numpy as np
import pytest
import torch

from megagrow.engine.state import live_state
from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.models.transformer import named_tensors
from megagrow.state.boxes import Box
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from tests.engine.plays import BATCH, Job, data_layouts, model_layouts, play_all
from tests.ranks import run_ranks
from tests.toys import build, toy_model, toy_models

STEPS = [("train", 20)]
MODELS = dict(toy_models())


@pytest.fixture(scope="module")
def alone():
    """Losses and gradient norms of one process at ZeRO 0 over 20 steps."""
    (losses, norms, _), *_ = run_ranks(1, play_all, [(STEPS, {})])[0]
    assert losses[-1] < losses[0] - 0.1, "it learns"
    assert max(norms) > 1.0, "it clips"
    return np.array(losses), np.array(norms)


def _check_curves(alone, world, plays):
    by_rank = run_ranks(world, play_all, plays, timeout=300)
    for (_, options), (losses, norms, _) in zip(plays, by_rank[0], strict=True):
        np.testing.assert_allclose(losses, alone[0], rtol=1e-5, err_msg=str(options))
        np.testing.assert_allclose(norms, alone[1], rtol=1e-4, err_msg=str(options))
    for other in by_rank[1:]:
        assert [losses for losses, *_ in other] == [losses for losses, *_ in by_rank[0]]


@pytest.mark.parametrize(("world", "micros"), [(1, (3, 12)), (2, (2, 6)), (3, (4,)), (4, (1, 3))])
def test_any_data_parallel_layout_has_the_loss_curve_of_one_process(alone, world, micros):
    plays = [
        (STEPS, {"layout": layout, "micro": micro})
        for layout in data_layouts(world)
        for micro in micros
        # With and without accumulation, but not every product of the two.
        if layout.zero in (0, 2) or micro == micros[0]
    ]
    _check_curves(alone, world, plays)


@pytest.mark.parametrize("world", [2, 4])
def test_any_layout_that_cuts_the_model_has_the_loss_curve_of_one_process(alone, world):
    _check_curves(alone, world, [(STEPS, {"layout": layout}) for layout in model_layouts(world)])


def _go_on_in_other_engines(comm, model):
    layouts = data_layouts(comm.world)
    return [_go_on(comm, layout, layouts, model) for layout in layouts]


def _go_on(comm, layout, layouts, model):
    straight = Job(comm, layout=layout, model=model)
    straight.train(4)
    straight.train(4)
    broken = Job(comm, layout=layout, model=model)
    broken.train(4)
    broken.move(layout)
    broken.train(2)
    # Through every other partitioning and back: an identity transfer changes no bit.
    for other in (*layouts, layout):
        broken.move(other)
    broken.train(2)
    return straight.losses, broken.losses


def test_a_run_goes_on_bit_for_bit_in_a_new_engine():
    model = toy_model(dropout=0.1, init_std=0.2)
    for by_zero in run_ranks(2, _go_on_in_other_engines, model):
        for zero, (straight, broken) in enumerate(by_zero):
            assert len(set(straight)) == 8 and straight == broken, f"ZeRO {zero}"


def _publish_all(comm, model):
    layouts = data_layouts(comm.world) + model_layouts(comm.world)
    return [_publish(comm, layout, model) for layout in layouts]


def _publish(comm, layout, model):
    """The engine's loss against the module's with the same parameters, in one process."""
    job = Job(comm, layout=layout, model=model, fresh=False)
    before = job.evaluate()
    state = job.load(seed=8)
    assert job.fault(state) is None
    samples = torch.from_numpy(job.data[-BATCH:])
    with torch.no_grad():
        return before, job.evaluate(), float(build(model, state)(samples))


def test_what_is_written_is_what_the_model_computes_with():
    for by_layout in run_ranks(2, _publish_all, MODELS["gpt2-untied"]):
        for before, after, expected in by_layout:
            assert math.isnan(before), "an engine without a state must not seem to have one"
            assert after == pytest.approx(expected, rel=1e-5)


def _foreign_boxes(comm):
    """Boxes that this rank does not hold, at ZeRO 1."""
    job = Job(comm, layout=Layout(data=comm.world, zero=1))
    place = job.engine.placement
    refused = 0
    for tensor in place.catalog:
        for rank, box in place.holders(tensor.name, Box((0,) * len(tensor.shape), tensor.shape)):
            if rank != comm.rank:
                with pytest.raises(KeyError, match="is not on this rank"):
                    job.engine.state.view(tensor.name, "master", box)
                refused += 1
    return refused


def test_a_rank_gives_only_what_it_holds():
    assert all(refused > 3 for refused in run_ranks(2, _foreign_boxes))


def _wrong_arithmetic(comm):
    """A placement whose groups are in a different order from the engine's."""
    job = Job(comm, layout=Layout(data=comm.world, zero=1))
    catalog = job.engine.placement.catalog
    deepspeed = job.engine._deepspeed
    with pytest.raises(RuntimeError, match="its partitioning is not the one"):
        live_state(
            engine=deepspeed,
            parameters=named_tensors(deepspeed.module),
            placement=Placement(catalog, job.engine.layout),
            rank=comm.rank,
            slots=job.engine.slots,
            rules=OptimizerRules(),
            optimizer_step=0,
        )


def test_another_partitioning_of_deepspeed_is_found():
    run_ranks(2, _wrong_arithmetic)


def test_every_family_trains_in_every_layout():
    plays = [
        ([("train", 3)], {"model": model, "layout": layout})
        for model in MODELS.values()
        for layout in data_layouts(2) + model_layouts(2)
    ]
    results = run_ranks(2, play_all, plays)[0]
    for (_, options), (losses, _, _) in zip(plays, results, strict=True):
        assert np.isfinite(losses).all() and losses[2] < losses[0], options
