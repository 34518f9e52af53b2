"""The catalog of logical tensors."""

import json
import math

import pytest

from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import Catalog, Init, LogicalTensor
from megagrow.state.parts import PARTS, part_of
from tests.toys import FAMILIES, toy_model, toy_models

MODELS = dict(toy_models())


def _tensor(name="w", shape=(2, 3), axes=("ffn", "embed")):
    return LogicalTensor(name, shape, axes, Init("normal", 0.02), True, (1,))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_json_keeps_everything(model):
    catalog = build_catalog(model)
    again = Catalog.from_json(json.loads(json.dumps(catalog.to_json())))
    assert again == catalog
    assert again.fingerprint() == catalog.fingerprint()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_one_std_is_that_of_all_but_the_writers(model):
    stds = {}
    for tensor in build_catalog(model):
        if tensor.init.kind == "normal":
            stds.setdefault(part_of(tensor), set()).add(tensor.init.std)
    writers = stds.pop("writer")
    assert set().union(*stds.values()) == {0.4} and writers == {0.4 / (2 * model.layers) ** 0.5}


@pytest.mark.parametrize("matrices", [0.1, "fan_in"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stds_by_role(family, matrices):
    stds = {"embedding": 0.5, "position": 0.3, "head": 0.05, "matrices": matrices}
    model = toy_model(family=family, init_std=stds, tie_embeddings=False, kv_heads=1, layers=3)
    seen = set()
    for tensor in build_catalog(model):
        part = part_of(tensor)
        seen.add(part)
        if part == "vector":
            assert tensor.init.kind in ("zeros", "ones")
        elif part in ("reader", "writer"):
            # Matrices are [outputs..., inputs...]; all axes of one side belong together.
            inputs = math.prod(tensor.shape[1:]) if part == "writer" else tensor.shape[-1]
            std = inputs**-0.5 if matrices == "fan_in" else matrices
            std /= 6**0.5 if part == "writer" else 1
            assert tensor.init.std == pytest.approx(std, rel=1e-12)
        else:
            assert tensor.init.std == stds[part]
    rotary = model.architecture.positions == "rotary"
    assert seen == set(PARTS) - {"other"} - ({"position"} if rotary else set())


def test_fingerprints_tell_catalogs_apart():
    prints = {build_catalog(model).fingerprint() for model in MODELS.values()}
    assert len(prints) == len(MODELS)


def test_look_up():
    catalog = Catalog((_tensor("a"), _tensor("b", (5,), ("embed",))))
    assert catalog["b"].volume == 5 and "a" in catalog and "c" not in catalog
    assert [t.name for t in catalog] == ["a", "b"] and len(catalog) == 2
    assert catalog.parameters == 11


def test_two_of_a_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        Catalog((_tensor(), _tensor()))


def test_every_axis_needs_a_name():
    with pytest.raises(ValueError, match="w: 2 axes but 1 names"):
        _tensor(axes=("embed",))


@pytest.mark.parametrize("missing", ["name", "shape", "axes", "init", "decay", "places"])
def test_incomplete_json_is_refused(missing):
    item = Catalog((_tensor(),)).to_json()[0]
    del item[missing]
    with pytest.raises(KeyError):
        Catalog.from_json([item])
