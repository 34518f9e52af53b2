"""The catalog of logical tensors."""

import json

import pytest
from toys import toy_models

from megagrow.model.catalog import build_catalog
from megagrow.state.catalog import Catalog, Init, LogicalTensor

MODELS = dict(toy_models())


def _tensor(name="w", shape=(2, 3), axes=("ffn", "embed")):
    return LogicalTensor(name, shape, axes, Init("normal", 0.02), True, (1,))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_json_keeps_everything(model):
    catalog = build_catalog(model)
    again = Catalog.from_json(json.loads(json.dumps(catalog.to_json())))
    assert again == catalog
    assert again.fingerprint() == catalog.fingerprint()


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
