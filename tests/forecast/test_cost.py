"""Predicted bytes of a growth, compared with counting every element."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.forecast.cost import STATE_BYTES, received
from megagrow.growth.plan import grown_model, make_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box, union_volume
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.moves import plan_sends
from tests.toys import toy_model

boxes = st.integers(0, 3).flatmap(
    lambda axes: st.lists(
        st.builds(
            Box,
            st.tuples(*[st.integers(0, 6)] * axes),
            st.tuples(*[st.integers(1, 5)] * axes),
        ),
        max_size=6,
    )
)


@settings(deadline=None)
@given(found=boxes)
def test_a_union_counts_every_element_once(found):
    elements = {
        index
        for box in found
        for index in itertools.product(
            *(range(a, b) for a, b in zip(box.offset, box.stop, strict=True))
        )
    }
    assert union_volume(found) == len(elements)


@pytest.mark.parametrize("operator", ["width", "depth_stack"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Layout(data=4, zero=1), Layout(data=2, tensor=2, zero=1)),
        (Layout(data=2, tensor=2, zero=0), Layout(tensor=2, pipeline=2, zero=1)),
        (Layout(data=4, zero=3), Layout(data=4, zero=3)),
        (Layout(tensor=2, zero=0), Layout(tensor=2, zero=0)),
    ],
)
def test_a_rank_receives_what_it_lacks(operator, old, new):
    model = toy_model(layers=2, heads=2, ffn=12)
    small = build_catalog(model)
    target = build_catalog(grown_model(model, operator=operator, factor=2))
    growth = make_growth(operator=operator, policy=None, small=small, target=target)
    a, b = Placement(small, old), Placement(target, new)
    sent = np.zeros((old.world, new.world), dtype=int)
    for rank in range(old.world):
        for move in plan_sends(growth, a, b, slots=ADAM_SLOTS, rank=rank):
            sent[rank, move.receiver] += move.part.volume * STATE_BYTES
    for rank in range(new.world):
        count = received(growth, a, b, slots=ADAM_SLOTS, rank=rank)
        assert count.local == sent[rank, rank]
        assert count.foreign == sent[:, rank].sum() - sent[rank, rank]
        needed = _needed(growth, b, rank) - _held(a, rank)
        assert count.least == len(needed) * STATE_BYTES
        assert count.least <= count.crossed <= count.foreign
        assert sum(count.by_holder.values()) == count.crossed
    if old == new and old.zero == 0:
        # Copies of heads and ffn units stay with their source, so nothing crosses.
        assert sent.sum() == np.trace(sent) > 0


def _elements(name, slot, box):
    ranges = (range(a, b) for a, b in zip(box.offset, box.stop, strict=True))
    return {(name, slot, index) for index in itertools.product(*ranges)}


def _held(placement, rank):
    return {
        element
        for shard in placement.shards(rank)
        for slot in ADAM_SLOTS
        for element in _elements(shard.tensor, slot.name, shard.box)
    }


def _needed(growth, placement, rank):
    found = set()
    for shard in placement.shards(rank):
        for slot in ADAM_SLOTS:
            for copy in growth.copies(growth.target[shard.tensor], slot):
                part = copy.from_target(shard.box)
                if part is not None:
                    found |= _elements(copy.source, slot.name, copy.source_hull(part))
    return found
