"""Roles of tensors, and the optimizer state that follows from them."""

import json
from collections import Counter

import pytest

from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import Catalog, Init, LogicalTensor, of_layer
from megagrow.state.optimizers import ADAMW, LION, MUON, OPTIMIZERS
from megagrow.state.roles import FINAL_NORM, MATRICES, NORMS, ROLES, WRITERS
from tests.toys import FAMILIES, toy_model, toy_models

MODELS = dict(toy_models())
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@every_model
def test_every_tensor_has_a_role_and_each_end_is_there_once(model):
    counts = Counter(tensor.role for tensor in build_catalog(model))
    assert "other" not in counts
    assert counts["embedding"] == counts["final_norm_gain"] == 1
    assert counts["head"] == (not model.tie_embeddings)
    assert counts["reader"] == counts["writer"] == counts["norm_gain"] == 2 * model.layers


@every_model
def test_readers_read_the_stream_and_writers_write_it(model):
    for tensor in build_catalog(model):
        if tensor.role in ("reader", "head"):
            assert tensor.reads == ("embed",) == tensor.axes[-1:]
        elif tensor.role == "writer":
            assert tensor.reads == tensor.axes[1:] and tensor.axes[0] == "embed"
        else:
            assert tensor.reads == ()
        assert tensor.decay == (tensor.role in MATRICES | {"embedding", "position", "head"})


@every_model
def test_a_tensor_knows_its_block(model):
    catalog = build_catalog(model)
    assert catalog.layers == model.layers
    for tensor in catalog:
        if tensor.layer is None:
            assert tensor.inner == tensor.name and tensor.places != (1,)
        else:
            assert tensor.places == (tensor.layer + 1,)
            assert of_layer(tensor.layer, tensor.inner) == tensor.name


@every_model
def test_catalogs_written_before_there_were_roles_are_read_as_today(model):
    catalog = build_catalog(model)
    before = json.loads(json.dumps(catalog.to_json()))
    for item in before:
        for key in ("role", "reads", "centred"):
            item.pop(key, None)
    assert Catalog.from_json(before) == catalog


def test_of_another_program_an_earlier_version_said_what_is_trained():
    item = {"shape": [2, 3], "axes": ["axis0", "axis1"], "init": {"kind": "normal", "std": 0.02},
            "decay": True, "places": [0]}  # fmt: skip
    names = {"layers.0.mlp.up.weight": "trained", "steps": "buffer", "old": "frozen"}
    stated = [
        {**item, "name": name, **({"role": said} if said != "trained" else {})}
        for name, said in names.items()
    ]
    found = Catalog.from_json(stated)
    assert {t.name: t.training for t in found} == names
    assert {t.role for t in found} == {"other"}
    assert Catalog.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "wrong", [{"role": "nothing"}, {"training": "never"}, {"reads": ("ffn",)}], ids=str
)
def test_what_is_no_role_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LogicalTensor("w", (2, 3), ("ffn", "embed"), Init("zeros"), True, (1,), **wrong)


def test_a_role_that_should_be_there_once_is_not_there_twice():
    twice = [
        LogicalTensor(name, (2, 3), ("vocab", "embed"), Init("zeros"), True, (0,), "embedding")
        for name in "ab"
    ]
    assert Catalog(tuple(twice[:1])).of("embedding") == twice[0]
    assert Catalog(()).of("embedding") is None
    with pytest.raises(ValueError, match="2 tensors have the role embedding"):
        Catalog(tuple(twice)).of("embedding")


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_steps_matrices_of_blocks_by_their_role_alone(family):
    catalog = build_catalog(toy_model(family=family, tie_embeddings=False))
    assert {t.role for t in catalog if MUON.orthogonalises(t)} == {"reader", "writer"}
    for kind in (ADAMW, LION):
        assert not any(kind.orthogonalises(tensor) for tensor in catalog)
    assert [len(OPTIMIZERS[name].slots) for name in ("adamw", "lion", "muon")] == [3, 2, 3]


def test_groups_of_roles_are_roles():
    assert set(ROLES) >= MATRICES | WRITERS | FINAL_NORM | NORMS
