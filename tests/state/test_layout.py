"""The process grid and its arithmetic."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.errors import ConfigError
from megagrow.state.layout import Layout, balanced_cuts, even_split, make_layout

sizes = st.integers(1, 4)


@given(data=sizes, tensor=sizes, pipeline=sizes)
def test_ranks_and_coordinates_are_inverse(data, tensor, pipeline):
    layout = Layout(data=data, tensor=tensor, pipeline=pipeline)
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    assert len(set(places)) == layout.world == data * tensor * pipeline
    for rank, at in enumerate(places):
        assert layout.rank(pipe=at.pipe, data=at.data, tensor=at.tensor) == rank
        assert at.pipe < pipeline and at.data < data and at.tensor < tensor


def test_tensor_neighbours_come_first_and_pipeline_stages_last():
    layout = Layout(data=3, tensor=2, pipeline=2)
    assert [layout.coordinates(rank).tensor for rank in range(4)] == [0, 1, 0, 1]
    assert [layout.coordinates(rank).pipe for rank in (0, 5, 6, 11)] == [0, 0, 1, 1]
    assert str(layout) == "tensor 2 x pipeline 2 x data 3, ZeRO 0"


def test_data_parallel_takes_what_is_left():
    layout = make_layout(world=12, tensor=2, pipeline=3, zero=1, key="layout")
    assert layout == Layout(data=2, tensor=2, pipeline=3, zero=1)


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(6, 4, 1), (2, 2, 2), (5, 1, 3)])
def test_a_world_that_does_not_divide_is_refused(world, tensor, pipeline):
    with pytest.raises(ConfigError) as caught:
        make_layout(world=world, tensor=tensor, pipeline=pipeline, zero=0, key="stages[1].layout")
    message = str(caught.value)
    assert message.startswith(f"stages[1].layout: {world} processes cannot be arranged")
    assert f"start {tensor * pipeline} processes or a multiple" in message


@given(length=st.integers(0, 40), parts=st.integers(1, 7))
def test_even_split_covers_in_order(length, parts):
    cuts = [even_split(length, parts, index) for index in range(parts)]
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(length))
    assert max(stop - start for start, stop in cuts) == -(-length // parts)


@given(weights=st.lists(st.integers(0, 30), min_size=1, max_size=8), data=st.data())
def test_balanced_cuts_against_brute_force(weights, data):
    parts = data.draw(st.integers(1, len(weights)))

    def heaviest(cuts):
        return max(sum(weights[a:b]) for a, b in itertools.pairwise(cuts))

    cuts = balanced_cuts(weights, parts)
    assert cuts[0] == 0 and cuts[-1] == len(weights) and len(cuts) == parts + 1
    assert all(a < b for a, b in itertools.pairwise(cuts)), "every part has an item"
    inner = itertools.combinations(range(1, len(weights)), parts - 1)
    assert heaviest(cuts) == min(heaviest((0, *c, len(weights))) for c in inner)


def test_too_few_items_are_refused():
    with pytest.raises(ValueError, match="2 items cannot fill 3 parts"):
        balanced_cuts([1, 1], 3)
