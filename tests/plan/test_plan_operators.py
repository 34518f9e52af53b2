"""A plan asks operators which sizes they grow, not what they are called."""

from dataclasses import replace

import pytest

from megagrow.cli.plan import growth_operators
from megagrow.config import GrowConfig
from megagrow.errors import ConfigError, GrowthError
from megagrow.forecast.planner import sizes_towards
from megagrow.forecast.scaling import find_law
from megagrow.growth.registry import OPERATORS
from megagrow.growth.settings import configured
from tests.toys import toy_model


@pytest.fixture
def renamed(monkeypatch):
    """A depth operator and a width operator of other names, the latter with a setting."""
    monkeypatch.setitem(OPERATORS, "taller", replace(OPERATORS["depth_stack"], name="taller"))
    fatter = replace(OPERATORS["width"], name="fatter", settings=("rewarm",))
    monkeypatch.setitem(OPERATORS, "fatter", fatter)


def test_operators_of_any_name_are_planned_with(renamed):
    assert growth_operators("taller,fatter") == ["taller", "fatter"]
    target, law = toy_model(layers=4, hidden=16, heads=4, ffn=32), find_law("chinchilla")
    usual = sizes_towards(target, law, operators=["depth_stack", "width"])
    assert sizes_towards(target, law, operators=["taller", "fatter"]) == usual
    assert len(usual) > 1
    deep = sizes_towards(target, law, operators=["taller"])
    assert len(deep) > 1 and all(size.width == 1 for size in deep)


@pytest.mark.parametrize("names", ["", "taller,depth_stack", "width,fatter", "vocab", "width,ligo"])
def test_a_plan_takes_one_operator_of_a_kind(names, renamed):
    with pytest.raises(ConfigError, match="one depth operator, one width operator"):
        growth_operators(names)


def test_the_settings_of_operators_are_those_that_operators_take(renamed):
    part = OPERATORS["depth_stack"]
    with pytest.raises(GrowthError, match=r"grow.rewarm: no operator takes it"):
        configured((part,), GrowConfig(operator="depth_stack", rewarm=3))
    keys = {key for operator in OPERATORS.values() for key in operator.settings}
    assert keys <= set(GrowConfig.model_fields)
