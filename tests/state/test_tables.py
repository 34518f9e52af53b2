"""Tables by role, axis, optimizer or format are complete; what they do not list is refused."""

from typing import get_args

import pytest

from megagrow.config import OptimizerConfig, PrecisionConfig
from megagrow.config.families import Architecture
from megagrow.engine.engine import _OPTIMIZERS
from megagrow.models.catalog import build_catalog
from megagrow.schedule.learning_rate import _SHAPES, Kind
from megagrow.state.catalog import AXES, Init, LogicalTensor, Slot
from megagrow.state.matrices import _CUTS, matrices
from megagrow.state.optimizers import ADAMW, LION, OPTIMIZERS
from megagrow.state.parts import _PARTS, PARTS, part_of
from megagrow.state.precision import PRECISIONS, format_of
from megagrow.state.roles import ROLES
from tests.toys import FAMILIES, featured_models, toy_model


def choices(section, key):
    return set(get_args(section.model_fields[key].annotation))


def test_every_optimizer_is_a_setting_and_can_be_made():
    assert choices(OptimizerConfig, "name") == set(OPTIMIZERS) == set(_OPTIMIZERS)
    for name in OPTIMIZERS:
        assert OptimizerConfig(name=name).kind.name == name


def test_bias_correction_is_a_property_of_the_optimizer():
    assert OptimizerConfig(name="lion").bias_correction is None
    assert OptimizerConfig(name="muon").bias_correction == (0.9, 0.95)
    assert (ADAMW.bias_corrected, LION.bias_corrected) == (True, False)


def test_every_number_format_is_a_setting():
    assert choices(PrecisionConfig, "dtype") == set(PRECISIONS)
    for one in PRECISIONS.values():
        assert (one.dtype.itemsize, format_of(one.dtype)) == (one.bytes, one)


def test_every_schedule_has_a_shape():
    assert set(_SHAPES) == set(get_args(Kind))


def test_every_role_has_a_part_and_every_axis_its_matrices():
    assert set(_PARTS) == set(ROLES) and set(_PARTS.values()) == set(PARTS)
    assert set(_CUTS) == set(AXES) - {"vocab", "position"}  # tables are no matrices of a block
    models = [toy_model(family=family, tie_embeddings=False) for family in FAMILIES]
    for model in (*models, *featured_models().values()):
        for tensor in build_catalog(model):
            assert set(tensor.axes) <= set(AXES)
            assert part_of(tensor) != "other"


def test_an_output_axis_that_is_not_known_has_no_matrices():
    tensor = LogicalTensor(
        "w", (4, 6), ("expert", "embed"), Init("zeros"), True, (1,), "reader", ("embed",)
    )
    with pytest.raises(ValueError, match="w: axis 'expert'"):
        matrices(tensor)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Init("uniform"), "uniform"),
        (lambda: Slot("exp_inf", "third_moment"), "exp_inf of kind 'third_moment'"),
        (lambda: architecture(norm="group"), "norm 'group'"),
        (lambda: architecture(positions="alibi"), "positions 'alibi'"),
        (lambda: architecture(activation="relu"), "activation 'relu'"),
    ],
)
def test_a_kind_that_nothing_implements_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def architecture(**changes):
    made = {"norm": "rms", "positions": "rotary", "gated": True, "biases": False}
    return Architecture(**made | {"activation": "silu"} | changes)
