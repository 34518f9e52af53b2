"""Blocks: the elements they map, and the preimages of boxes."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megagrow.state.boxes import Box
from megagrow.state.catalog import ADAM_SLOTS, Catalog, Init, LogicalTensor
from megagrow.transfer.state_map import AxisMap, Copy, FreshStart, Identity

axis_maps = st.builds(
    AxisMap,
    target_start=st.integers(0, 5),
    target_step=st.integers(1, 4),
    source_start=st.integers(0, 5),
    source_step=st.integers(1, 4),
    length=st.integers(1, 6),
)
ranges = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda r: (r[0], r[0] + r[1]))


@given(axis=axis_maps, bounds=ranges)
def test_an_axis_pulls_back_exactly_what_lies_inside(axis, bounds):
    start, stop = bounds
    for (low, high), first, step in (
        (axis.from_target(start, stop), axis.target_start, axis.target_step),
        (axis.from_source(start, stop), axis.source_start, axis.source_step),
    ):
        inside = [u for u in range(axis.length) if start <= first + u * step < stop]
        assert list(range(low, high)) == inside


def _elements(slices):
    return list(itertools.product(*(range(s.start, s.stop, s.step) for s in slices)))


@given(axes=st.lists(axis_maps, min_size=1, max_size=3), data=st.data())
def test_a_part_names_the_same_elements_on_both_sides(axes, data):
    copy = Copy("w", tuple(axes), 1.0)
    offset = [data.draw(st.integers(0, a.length - 1)) for a in axes]
    shape = [data.draw(st.integers(1, a.length - o)) for a, o in zip(axes, offset, strict=True)]
    part = Box(tuple(offset), tuple(shape))
    origin = (0,) * len(axes)
    units = list(itertools.product(*(range(o, o + n) for o, n in zip(offset, shape, strict=True))))
    target = [
        tuple(a.target_start + u * a.target_step for a, u in zip(axes, unit, strict=True))
        for unit in units
    ]
    source = [
        tuple(a.source_start + u * a.source_step for a, u in zip(axes, unit, strict=True))
        for unit in units
    ]
    assert _elements(copy.target_slices(part, origin)) == target
    assert _elements(copy.source_slices(part, origin)) == source
    for hull, elements, pull in (
        (copy.target_hull(part), target, copy.from_target),
        (copy.source_hull(part), source, copy.from_source),
    ):
        assert hull.offset == elements[0]
        assert hull.stop == tuple(i + 1 for i in elements[-1])
        assert pull(hull) == part
    assert copy.volume == len(list(itertools.product(*(range(a.length) for a in axes))))


def test_a_box_beside_the_block_feeds_nothing():
    copy = Copy("w", (AxisMap(1, 2, 0, 1, 3),), 1.0)  # target elements 1, 3, 5
    assert copy.from_target(Box((2,), (1,))) is None
    assert copy.from_target(Box((6,), (4,))) is None
    assert copy.from_source(Box((3,), (2,))) is None
    assert copy.from_target(Box((2,), (3,))) == Box((1,), (1,))


def test_identity_and_fresh_start():
    tensor = LogicalTensor("w", (3, 4), ("ffn", "embed"), Init("normal", 1.0), True, (1,))
    catalog = Catalog((tensor,))
    same = AxisMap(0, 1, 0, 1, 3), AxisMap(0, 1, 0, 1, 4)
    for slot in ADAM_SLOTS:
        assert Identity(catalog).copies(tensor, slot) == (Copy("w", same, 1.0),)
        assert Identity(catalog).fill(tensor, slot) == "covered"
        assert FreshStart(catalog).copies(tensor, slot) == ()
    fills = [FreshStart(catalog).fill(tensor, slot) for slot in ADAM_SLOTS]
    assert fills == ["fresh", "zeros", "zeros"]
