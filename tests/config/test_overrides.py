import pytest

from megagrow.config.overrides import apply_overrides
from megagrow.errors import ConfigError

DATA = {
    "model": {"layers": 2},
    "stages": [{"until": {"steps": 1}}, {"until": {"steps": 2}}],
    "x": None,
}


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("model.layers=3", ("model", "layers"), 3),
        ("model.new=1e-3", ("model", "new"), 1e-3),
        ("optimizer.lr=0.1", ("optimizer", "lr"), 0.1),
        ("x.y.z=[1, 2]", ("x", "y", "z"), [1, 2]),
        ("stages.1.until.steps=5e5", ("stages", 1, "until", "steps"), 500_000),
        ("stages[0].until={tokens: 1e6}", ("stages", 0, "until"), {"tokens": 1_000_000}),
        ("stages=[{until: {steps: 9}}]", ("stages",), [{"until": {"steps": 9}}]),
        ("run.dir=a=b", ("run", "dir"), "a=b"),
        ("data.tokenizer=", ("data", "tokenizer"), None),
    ],
)
def test_sets_one_value(override, where, value):
    found = apply_overrides(DATA, [override])
    for part in where:
        found = found[part]
    assert found == value


def test_leaves_its_input_and_other_values_alone():
    before = {"a": {"b": 1, "c": [1, 2]}}
    after = apply_overrides(before, ["a.c.0=7"])
    assert before == {"a": {"b": 1, "c": [1, 2]}}
    assert after == {"a": {"b": 1, "c": [7, 2]}}


def test_the_last_one_wins():
    assert apply_overrides({}, ["a.b=1", "a.b=2", "a={b: 3}", "a.c=4"]) == {"a": {"b": 3, "c": 4}}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.layers", ["'model.layers'", "key.sub=value"]),
        ("=3", ["key.sub=value"]),
        ("model..layers=3", ["key.sub=value"]),
        ("--model.layers=3", ["key.sub=value"]),
        ("model.layers =3", ["without spaces"]),
        ("model.layers=[1", ["model.layers=[1", "valid YAML"]),
        ("model.layers.deep=1", ["model.layers holds one value", "2"]),
        ("stages.2.until.steps=1", ["stages", "0 to 1", "stages=[...]"]),
        ("stages.first=1", ["stages", "'first'"]),
    ],
)
def test_refused(override, says):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(DATA, [override])
    for part in says:
        assert part in str(caught.value)


def test_index_into_an_empty_list():
    with pytest.raises(ConfigError, match="empty"):
        apply_overrides({"stages": []}, ["stages.0.until.steps=1"])
