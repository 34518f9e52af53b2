"""Boxes compared with brute force: numbered elements of small tensors."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megagrow.state.boxes import (
    Box,
    flat_offset,
    flat_range_boxes,
    split_box,
    tiling_fault,
    whole,
)

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw, shape):
    offset = [draw(st.integers(0, n - 1)) for n in shape]
    length = [draw(st.integers(1, n - start)) for n, start in zip(shape, offset, strict=True)]
    return Box(tuple(offset), tuple(length))


@st.composite
def shape_and_boxes(draw, count):
    shape = draw(shapes)
    return shape, *(draw(boxes_in(shape)) for _ in range(count))


def numbered(shape):
    """A tensor whose elements are their own row-major positions."""
    return np.arange(math.prod(shape)).reshape(shape)


def elements(shape, box):
    return set(numbered(shape)[box.slices].ravel().tolist())


@st.composite
def tilings(draw, shape):
    """A random exact tiling, by repeatedly splitting boxes in two."""
    parts = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axes = [axis for axis, n in enumerate(box.shape) if n > 1]
        if not axes:
            parts.append(box)
            continue
        axis = draw(st.sampled_from(axes))
        cut = draw(st.integers(1, box.shape[axis] - 1))
        first, second = list(box.shape), list(box.shape)
        first[axis], second[axis] = cut, box.shape[axis] - cut
        offset = list(box.offset)
        offset[axis] += cut
        parts += [Box(box.offset, tuple(first)), Box(tuple(offset), tuple(second))]
    return draw(st.permutations(parts))


@given(shape_and_boxes(2))
def test_intersect_and_contains(case):
    shape, a, b = case
    common = a.intersect(b)
    expected = elements(shape, a) & elements(shape, b)
    assert (elements(shape, common) if common else set()) == expected
    assert common == b.intersect(a)
    assert a.contains(b) == (elements(shape, b) <= elements(shape, a))


@given(shape_and_boxes(2))
def test_moving_there_and_back(case):
    _, a, b = case
    assert a.relative_to(b.offset).moved_by(b.offset) == a
    assert a.relative_to(a.offset) == whole(a.shape)
    assert a.volume == math.prod(a.shape)
    assert str(Box((1, 0), (2, 7))) == "[1:3,0:7]" and str(Box((), ())) == "[]"


@given(shape_and_boxes(1))
def test_flat_offset_is_the_row_major_position(case):
    shape, box = case
    assert flat_offset(shape, box.offset) == numbered(shape)[box.offset]


@given(shapes, st.data())
def test_flat_range_boxes_cut_exactly_the_range(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    found = list(flat_range_boxes(shape, start, stop))
    # In increasing order, each box contiguous and at its position: together exactly the range.
    listed = []
    for box, position in found:
        inside = numbered(shape)[box.slices].ravel().tolist()
        assert inside == list(range(position, position + box.volume))
        listed += inside
    assert listed == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(shape_and_boxes(1), st.integers(1, 40))
def test_split_box_keeps_order_and_limit(case, limit):
    shape, box = case
    parts = list(split_box(box, limit))
    assert all(0 < part.volume <= limit for part in parts)
    listed = [i for part in parts for i in numbered(shape)[part.slices].ravel().tolist()]
    assert listed == numbered(shape)[box.slices].ravel().tolist()
    if box.volume <= limit:
        assert parts == [box]


@given(shapes, st.data())
def test_exact_tilings_have_no_fault(shape, data):
    assert tiling_fault(shape, data.draw(tilings(shape))) is None


@settings(max_examples=300)
@given(shapes.filter(len), st.data())
def test_tiling_fault_agrees_with_counting(shape, data):
    """An exact tiling with one box changed, added or removed."""
    parts = data.draw(tilings(shape))
    odd = data.draw(boxes_in(shape))
    how = data.draw(st.sampled_from(["replace", "add", "drop"]))
    parts = [*parts, odd] if how == "add" else parts[1:] + [odd] * (how == "replace")
    counts = np.zeros(shape, dtype=int)
    for box in parts:
        counts[box.slices] += 1
    assert (tiling_fault(shape, parts) is None) == bool((counts == 1).all())


@given(st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple), st.data())
def test_the_fault_names_a_real_overlap(shape, data):
    first, second = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    assume(first.intersect(second) is not None)
    fault = tiling_fault(shape, [first, second])
    assert "overlap" in fault and str(first) in fault and str(second) in fault


@pytest.mark.parametrize(
    ("shape", "boxes", "says"),
    [
        ((4,), [Box((0,), (3,))], "a piece is missing"),
        ((4,), [], "a piece is missing"),
        ((4,), [Box((2,), (3,))], "outside"),
        ((4,), [Box((-1,), (5,))], "outside"),
        ((4,), [Box((0, 0), (4, 1))], "wrong number of axes"),
        ((4,), [Box((0,), (4,)), Box((1,), (0,))], "empty"),
        ((), [], "a piece is missing"),
        ((), [Box((), ()), Box((), ())], "overlap"),
    ],
)
def test_faults_by_name(shape, boxes, says):
    assert says in tiling_fault(shape, boxes)


def test_a_tensor_without_axes_is_one_element():
    assert tiling_fault((), [Box((), ())]) is None
    assert list(flat_range_boxes((), 0, 1)) == [(Box((), ()), 0)]
    assert list(flat_range_boxes((), 0, 0)) == []
    assert whole(()).volume == 1


def test_a_long_range_is_cut_without_walking_it():
    shape = (50_000, 12_288)
    found = [box for box, _ in flat_range_boxes(shape, 12_287, 12_288 * 49_999 + 5)]
    assert [box.volume for box in found] == [1, 12_288 * 49_998, 5]
