"""Statistics that growths depend on: correct, and bit-identical in every layout."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.errors import GrowthError
from megagrow.growth.plan import make_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS, Catalog, Init, LogicalTensor
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.state_map import FreshStart, Identity, Statistic
from megagrow.transfer.statistics import measure, measuring_bytes, required
from megagrow.transfer.whole_state import MemoryState
from tests.toys import FAMILIES, ShardState, larger, on_threads, random_state, toy_model

STAGING = 1 << 20
LAYOUTS = [
    Layout(data=1, tensor=2, pipeline=2),
    Layout(data=4, zero=3),
    Layout(data=2, tensor=2, zero=1),
    Layout(data=2, pipeline=2, zero=0),
    Layout(data=4, zero=0),
]


def _one(values, kind, axis=None):
    tensor = LogicalTensor("w", values.shape, ("a", "b")[: values.ndim], Init("zeros"), True, (0,))
    catalog = Catalog((tensor,))
    state = MemoryState({("w", "master"): torch.from_numpy(values)})
    statistic = Statistic("w", values.shape, kind, axis)
    place = Placement(catalog, Layout())
    return measure([statistic], old=state, locator=place, staging_bytes=STAGING)[statistic].numpy()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 1000),
)
def test_statistics_are_what_they_are_called(rows, columns, scale, seed):
    values = scale * np.random.default_rng(seed).normal(size=(rows, columns))
    # A sum with cancellation has the precision of its summands.
    close = {"rtol": 1e-12, "atol": 1e-14 * np.abs(values).max()}
    rms = np.sqrt(np.mean((values / scale) ** 2)) * scale
    np.testing.assert_allclose(_one(values, "rms"), [[rms]], rtol=1e-12)
    np.testing.assert_allclose(_one(values, "mean"), values.mean(keepdims=True), **close)
    for axis in (0, 1):
        found = _one(values, "mean", axis)
        np.testing.assert_allclose(found, values.mean(axis, keepdims=True), **close)
    np.testing.assert_allclose(_one(values[0], "mean"), [values[0].mean()], **close)


def test_zeros_have_statistics_of_zero():
    assert not _one(np.zeros((3, 4)), "rms") and not _one(np.zeros((3, 4)), "mean", 0).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    values = np.ones((3, 4))
    values[1, 2] = bad
    with pytest.raises(GrowthError, match="w has values that are not finite"):
        _one(values, "rms")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_growth_needs(family):
    model = toy_model(family=family)
    small = build_catalog(model)
    target = build_catalog(larger(model, "width_fresh", 2))
    growth = make_growth(operator="width_fresh", policy=None, small=small, target=target)
    found = {(s.tensor, s.kind, s.axis) for s in required(growth, ADAM_SLOTS)}
    assert ("layers.1.mlp.up.weight", "rms", None) in found
    assert ("final_norm.weight", "mean", None) in found
    assert (("embedding.token", "mean", 1) in found) == (family == "gpt2")
    assert not required(Identity(small), ADAM_SLOTS) and not required(FreshStart(small))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_measures_the_same_bits(family, layout):
    model = toy_model(family=family)
    catalog = build_catalog(model)
    state = random_state(catalog, seed=5, dtype=torch.float32)
    needed = [
        Statistic(t.name, t.shape, kind, axis)
        for t in catalog
        for kind, axis in (("rms", None), ("mean", None), ("mean", len(t.shape) - 1))
    ]
    alone = measure(needed, old=state, locator=Placement(catalog, Layout()), staging_bytes=STAGING)
    place = Placement(catalog, layout)

    def rank(channel):
        old = ShardState(place, channel.rank, whole_state=state)
        return measure(
            needed, old=old, locator=place, rank=channel.rank, channel=channel, staging_bytes=700
        )

    for found in on_threads(rank, layout.world):
        assert list(found) == needed
        assert all(torch.equal(found[key], alone[key]) for key in needed)
    first = state.view(catalog.tensors[0].name, "master", whole(catalog.tensors[0].shape)).double()
    assert alone[needed[0]].item() == pytest.approx(first.square().mean().sqrt().item(), rel=1e-12)


def test_pieces_are_as_small_as_asked():
    """The no-gather law: the size of a read does not depend on the tensor."""
    values = np.random.default_rng(0).normal(size=(40, 50))
    tensor = LogicalTensor("w", values.shape, ("a", "b"), Init("zeros"), True, (0,))
    state, read = MemoryState({("w", "master"): torch.from_numpy(values)}), []

    class Watched:
        def read(self, name, slot, box):
            read.append(box.volume)
            return state.read(name, slot, box)

    statistic = Statistic("w", values.shape, "rms")
    place = Placement(Catalog((tensor,)), Layout())
    measure([statistic], old=Watched(), locator=place, staging_bytes=3200)
    assert max(read) <= 100 and sum(read) == 2 * values.size
    assert measuring_bytes([statistic], 3200, "cpu") == 3200
    assert measuring_bytes([statistic], 1 << 30, "cpu") == 32 * values.size
    assert measuring_bytes([], 1 << 30, "cpu") == 0


def test_what_is_measured_is_not_changed():
    """Also in double precision, where a conversion would be the tensor itself."""
    values = np.random.default_rng(0).normal(size=(4, 5))
    before = values.copy()
    _one(values, "rms"), _one(values, "mean", 0)
    assert np.array_equal(values, before)
