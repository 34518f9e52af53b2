"""Growth of a running job under DeepSpeed: laws 2, 5, 6 and 7 through real engines."""

import itertools

import numpy as np
import pytest

from megagrow.state.layout import Layout
from tests.engine.plays import (
    Job,
    data_layouts,
    growth_faults,
    model_layouts,
    play_all,
)
from tests.ranks import run_ranks
from tests.toys import growths


def _check(world, cases):
    for rank, faults in enumerate(run_ranks(world, growth_faults, cases, timeout=500)):
        found = [(*case, fault) for case, fault in zip(cases, faults, strict=True) if fault]
        assert not found, (rank, found)


def _pairs(world):
    layouts = data_layouts(world) + model_layouts(world)
    return [(before, after) for before in layouts for after in layouts]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_live_growth_equals_growing_in_one_process_and_slicing(world):
    """Every layout a few times before and after, with alternating growths."""
    some = _pairs(world)[:: {2: 4, 3: 2, 4: 7}[world]]
    by_turns = itertools.cycle(growths())
    _check(world, [(a, b, next(by_turns)) for a, b in some])


# These depend on statistics of the old state, or combine tensors held by different ranks.
MEASURING = [
    ("width_fresh", "kept", 2),
    ("width_noise", "sparkling", 3),
    ("width_perturb", "copy", 2),
    ("untie", "copy", 2),
]


def test_growths_that_depend_on_the_whole_old_state_are_the_same_in_every_layout():
    by_turns = itertools.cycle(MEASURING)
    _check(2, [(a, b, next(by_turns)) for a, b in _pairs(2)[1::3]])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_live_growth_equals_slicing_for_all_pairs(world):
    by_turns = itertools.cycle(growths())
    _check(world, [(a, b, next(by_turns)) for a, b in _pairs(world)])


def _story(layouts, policy):
    """Train, widen, train, stack, train, each growth stage in its own layout."""
    a, b, c = layouts
    script = [
        ("train", 6),
        ("grow", "width", policy, 2, b),
        ("train", 6),
        ("grow", "depth_stack", "copy", 2, c),
        ("train", 6),
    ]
    return script, {"layout": a}


@pytest.fixture(scope="module", params=["sparkling", "exact", "reset"])
def alone(request):
    """The story in one process at ZeRO 0."""
    losses, _, evaluations = run_ranks(1, play_all, [_story([Layout()] * 3, request.param)])[0][0]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    return request.param, np.array(losses), evaluations


@pytest.mark.parametrize("world", [2, 3])
def test_a_grown_run_goes_on_as_in_one_process(alone, world):
    policy, expected, _ = alone
    layouts = data_layouts(world) + model_layouts(world)
    # Every layout first, followed by two others.
    turned = zip(layouts, layouts[2:] + layouts[:2], layouts[3:] + layouts[:3], strict=True)
    plays = [_story(three, policy) for three in turned]
    if world > 2 or policy == "reset":
        plays = plays[::3]
    for rank_plays in run_ranks(world, play_all, plays):
        for losses, _, evaluations in rank_plays:
            np.testing.assert_allclose(losses, expected, rtol=1e-5)
            # Widening keeps the loss, stacking does not.
            assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-5)
            assert abs(evaluations[3] - evaluations[2]) > 1e-3


def _retrace_all(comm):
    layouts = data_layouts(comm.world) + model_layouts(comm.world)
    return [_retrace(comm, a, b) for a, b in zip(layouts, layouts[1:] + layouts[:1], strict=True)]


def _retrace(comm, before, after):
    """An exactly grown run next to the small one; eps and decay matter, nothing is clipped."""
    options = {"layout": before, "grad_clip": 0.0, "eps": 1e-3}
    small, large = Job(comm, **options), Job(comm, **options)
    small.train(15)
    large.train(5)
    large.grow("width", "exact", 2, after)
    large.train(10)
    return small.losses, large.losses


def test_exact_growth_retraces_the_small_run():
    for by_layout in run_ranks(2, _retrace_all):
        for small, large in by_layout:
            assert small[:5] == large[:5]
            np.testing.assert_allclose(large, small, rtol=1e-5)


def _twins(comm):
    """How far copies are apart after training, with the breaker and without."""
    gaps = []
    for policy in ("exact", "sparkling"):
        job = Job(comm)
        job.train(2)
        growth = job.grow("width", policy, 2, Layout())
        job.train(5)
        weight = growth.target["layers.0.mlp.up.weight"]
        values = job.engine.state.read(
            weight.name, "master", next(job.engine.placement.shards_of(weight.name, comm.rank)).box
        )
        gaps.append(float((values[0::2] - values[1::2]).abs().max()))
    return gaps


def test_twins_part_with_the_breaker_alone():
    ((exact, sparkling),) = run_ranks(1, _twins)
    assert exact < 1e-6 < 1e-4 < sparkling
