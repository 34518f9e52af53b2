"""Initial values: functions of seed, name and position alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.state.boxes import Box, whole
from megagrow.state.catalog import Init, LogicalTensor
from megagrow.state.fresh import fresh

# fmt: off
PINNED = [
    -0.029208612120867745, 0.0008108219440393766, 0.05624363423415769,
    -0.008974245039388564, 0.02355431473950631, 0.022550508703244758,
]
# fmt: on


def _tensor(shape, *, name="w", kind="normal", std=0.02):
    axes = tuple(f"axis{i}" for i in range(len(shape)))
    return LogicalTensor(name, tuple(shape), axes, Init(kind, std), True, (1,))


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), data=st.data())
def test_a_box_is_a_slice_of_the_whole(shape, data):
    offset = [data.draw(st.integers(0, n - 1)) for n in shape]
    lengths = [data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)]
    box = Box(tuple(offset), tuple(lengths))
    tensor = _tensor(shape)
    values = fresh(tensor, whole(shape), seed=7)
    np.testing.assert_array_equal(fresh(tensor, box, seed=7), values[box.slices])


def test_values_are_normal():
    values = fresh(_tensor((300, 400), std=0.5), whole((300, 400)), seed=1)
    assert abs(values.mean()) < 5 * 0.5 / np.sqrt(values.size)
    assert abs(values.std() / 0.5 - 1) < 0.01
    share = [(np.abs(values) < k * 0.5).mean() for k in (1, 2, 3)]
    np.testing.assert_allclose(share, [0.6827, 0.9545, 0.9973], atol=0.005)
    flat = values.ravel()
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.015
    assert len(np.unique(flat)) > 0.999 * flat.size


def test_the_values_never_change():
    """Resumed and grown runs depend on these values: another generator would change the run."""
    values = fresh(_tensor((2, 3), name="embedding.token"), whole((2, 3)), seed=1234)
    again = fresh(_tensor((6,), name="embedding.token"), whole((6,)), seed=1234)
    np.testing.assert_array_equal(values.ravel(), again)
    np.testing.assert_allclose(values.ravel(), PINNED, rtol=1e-12)


def test_seeds_and_names_give_other_values():
    box = whole((40, 50))
    one = fresh(_tensor((40, 50), name="a"), box, seed=1)
    for other in (
        fresh(_tensor((40, 50), name="b"), box, seed=1),
        fresh(_tensor((40, 50), name="a"), box, seed=2),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(("kind", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_constants(kind, value):
    np.testing.assert_array_equal(
        fresh(_tensor((4, 5), kind=kind), Box((1, 1), (2, 3)), seed=1), np.full((2, 3), value)
    )
