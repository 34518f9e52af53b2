"""A family from outside the package: it is registered, trained, grown and converted.

The laws of growth are tested on it in tests/growth, as one of the models.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint import CheckpointMeta, NativeCheckpoint, Piece, SoloGroup, newest, save
from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.formats.deepspeed.names import recognised_model
from megagrow.checkpoint.formats.megatron.names import read_model, write_args
from megagrow.checkpoint.interface.format import ReadOptions
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.config import ModelConfig
from megagrow.config.families import ARCHITECTURES, Architecture
from megagrow.errors import CheckpointError, ConfigError
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.models import registry
from megagrow.models.catalog import build_catalog
from megagrow.models.family import Family
from megagrow.models.flops import forward_flops_by_place
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from tests.jobs import events, launch, log_of, settings, write_config
from tests.models import toy_family
from tests.toys import random_state, toy_model

toy_family.register()


def test_every_family_that_a_configuration_may_name_is_registered():
    assert set(ARCHITECTURES) == set(registry.FAMILIES)
    for name, family in registry.FAMILIES.items():
        assert family.name == name and family.architecture is ARCHITECTURES[name]


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_modules_catalog_and_flops_of_a_family_agree(family):
    model = toy_model(family=family, tie_embeddings=False)
    catalog = build_catalog(model)
    parameters = named_tensors(Transformer(model))
    assert {t.name: t.shape for t in catalog} == {n: tuple(p.shape) for n, p in parameters.items()}
    assert len(forward_flops_by_place(model)) == model.layers + 2
    assert {place for t in catalog for place in t.places} == set(range(model.layers + 2))


def test_two_families_do_not_share_a_name():
    registry.register(toy_family.TOY)  # again: no effect
    other = Architecture(
        norm="rms", positions="rotary", gated=True, biases="none", activation="gelu"
    )
    with pytest.raises(ValueError, match="another family 'toy'"):
        registry.register(Family(name="toy", architecture=other))


def test_a_family_checks_its_models():
    with pytest.raises(ValueError, match="a toy has no dropout"):
        toy_model(family="toy", dropout=0.1)
    with pytest.raises(ValueError, match=r"'gpt2'.* or 'toy'"):
        toy_model(family="toys")


# --- a run --------------------------------------------------------------------------------


LAYOUTS = {"data": {"zero": 1}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_trains_and_grows_in_width_and_in_depth(layout, tmp_path, dataset):
    mapping = settings(dataset, tmp_path / "run", layout=layout)
    mapping["model"]["family"] = "toy"
    config = write_config(tmp_path / "run.yaml", mapping)
    hook = (toy_family.register,)
    [outcomes] = launch(2, ["--config", config], hook=hook)
    assert [o.status for o in outcomes] == [0, 0], outcomes[0].err
    log = log_of(config)
    losses = [line["loss"] for line in events(log, "step")]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert len(events(log, "growth")) == 2
    checkpoint = NativeCheckpoint.open(newest(tmp_path / "run" / "checkpoints"))
    grown = model_of(checkpoint)
    assert (grown.family, grown.hidden, grown.layers) == ("toy", 16, 4)
    assert checkpoint.catalog == build_catalog(grown)


# --- other formats ------------------------------------------------------------------------


def saved(root, model):
    catalog = build_catalog(model)
    state = random_state(catalog, seed=3, dtype=torch.float32)
    meta = CheckpointMeta(
        catalog=catalog,
        slots=ADAM_SLOTS,
        layout=Layout(),
        config={"model": model.model_dump(mode="json", by_alias=True)},
        fingerprints={},
        run_state={"step": 7, "growth_stage": 0, "rules": OptimizerRules().to_json()},
    )
    placement = Placement(catalog, Layout(), group_keys(catalog, OptimizerRules()))
    pieces = [
        Piece(shard.tensor, slot.name, shard.box, state.read(shard.tensor, slot.name, shard.box))
        for shard in placement.written_by(0)
        for slot in ADAM_SLOTS
    ]
    return save(root, step=7, pieces=pieces, meta=meta, group=SoloGroup())


def opened(path):
    fmt, at = detect(path)
    return fmt.open_source(at)


def values_of(path):
    source = opened(path)
    return {
        (t.name, slot.name): source.read(t.name, slot.name, whole(t.shape))
        for t in source.catalog
        for slot in source.slots
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("fmt", ["huggingface", "deepspeed", "universal", "dcp"])
def test_native_to_another_format_and_back_is_the_identity(tmp_path, fmt, tied):
    model = toy_model(family="toy", heads=4, kv_heads=2, head_dim=4, tie_embeddings=tied)
    path = saved(tmp_path / "native", model)
    convert(Job(path, tmp_path / "there", fmt), workers=1, verify=True)
    if fmt == "huggingface":
        config = json.loads((tmp_path / "there" / "config.json").read_text())
        assert config["architectures"] == ["ToyForCausalLM"] and config["inner"] == model.ffn
    assert {t.role for t in opened(tmp_path / "there").catalog} == {
        t.role for t in build_catalog(model)
    }
    convert(Job(tmp_path / "there", tmp_path / "back", "native"), workers=1, verify=True)
    assert model_of(opened(tmp_path / "back")).family == "toy"
    wanted, found = values_of(path), values_of(tmp_path / "back")
    kept = {"master"} if fmt == "huggingface" else {slot.name for slot in ADAM_SLOTS}
    for (name, slot), values in wanted.items():
        assert slot not in kept or torch.equal(found[name, slot], values), (name, slot)


def test_megatron_has_no_such_mlp_and_says_so(tmp_path):
    path = saved(tmp_path / "native", toy_model(family="toy"))
    with pytest.raises(CheckpointError, match="Megatron has no model of family toy"):
        convert(Job(path, tmp_path / "there", "megatron"), workers=1)


def test_a_family_that_transformers_lacks_is_refused_by_name(tmp_path, monkeypatch):
    alone = Family(name="toy", architecture=toy_family.TOY.architecture)
    monkeypatch.setitem(registry.FAMILIES, "toy", alone)
    path = saved(tmp_path / "native", toy_model(family="toy"))
    with pytest.raises(CheckpointError, match="no model of family toy"):
        convert(Job(path, tmp_path / "there", "huggingface"), workers=1)


def without_settings(family):
    return replace(registry.FAMILIES[family].architecture, settings=frozenset())


def test_the_shape_is_reported_by_the_names_of_a_deepspeed_checkpoint_alone():
    for family in registry.FAMILIES:
        model = toy_model(family=family, tie_embeddings=False)
        shapes = {tensor.name: tensor.shape for tensor in build_catalog(model)}
        found = recognised_model(shapes, tensor=1, where=Path("there"))
        assert isinstance(found, ModelConfig)
        # Of families that differ only in settings, which shapes do not show, the plainest is read.
        assert without_settings(found.family) == without_settings(family)
        assert found.architecture.settings <= model.architecture.settings


# --- families that files cannot tell apart ------------------------------------------------


@pytest.fixture
def twin(monkeypatch):
    """A family with llama's tensors that computes another function of them."""
    made = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "twin", made)
    family = Family(name="twin", architecture=made)
    monkeypatch.setitem(registry.FAMILIES, "twin", family)
    return family


def without_client_state(path):
    """Remove what megagrow adds to the files of another program."""
    for file in path.rglob("*model_states.pt"):
        head = torch.load(file, weights_only=False)
        if "megagrow" in head:
            del head["megagrow"]
            torch.save(head, file)
    for file in path.glob("*.crc*"):
        file.unlink()


@pytest.mark.parametrize("form", ["deepspeed", "universal"])
def test_of_two_families_that_fit_none_is_chosen(form, twin, tmp_path):
    source = saved(tmp_path / "native", toy_model(family="llama"))
    path = tmp_path / form
    convert(Job(source, path, form), workers=1)
    written, at = detect(path)
    assert model_of(written.open_source(at)).family == "llama"  # it is written down
    with pytest.raises(CheckpointError, match="does not fit family twin"):
        written.open(at, ReadOptions(family="twin"))
    without_client_state(path)
    with pytest.raises(CheckpointError, match="fits several families") as refused:
        written.open_source(at)
    assert "--family llama" in str(refused.value)
    for family in ("llama", "twin"):
        assert model_of(written.open(at, ReadOptions(family=family))).family == family
    with pytest.raises(CheckpointError, match="does not fit family gpt2"):
        written.open(at, ReadOptions(family="gpt2"))
    with pytest.raises(ConfigError, match="no such family"):
        written.open(at, ReadOptions(family="t5"))
    with pytest.raises(ConfigError, match="does not use --vocab-size"):
        written.open(at, ReadOptions(vocabulary=13))


def test_megatron_gets_no_family_that_merely_has_the_tensors_of_its_own(twin, tmp_path):
    path = saved(tmp_path / "native", toy_model(family="twin"))
    with pytest.raises(CheckpointError, match="Megatron has no model of family twin"):
        convert(Job(path, tmp_path / "there", "megatron"), workers=1)


def test_of_two_families_that_megatron_has_none_is_chosen(twin, monkeypatch):
    model = toy_model(family="llama")
    args = write_args(model, Layout(), padded=128)
    read = partial(read_model, args, where="there")
    assert read(options=ReadOptions())[0].family == "llama"
    also = Family(name="twin", architecture=twin.architecture, megatron=True)
    monkeypatch.setitem(registry.FAMILIES, "twin", also)
    with pytest.raises(CheckpointError, match="fits several families"):
        read(options=ReadOptions())
    assert read(options=ReadOptions(), written="twin")[0].family == "twin"
    assert read(options=ReadOptions(family="twin"))[0].family == "twin"


def test_a_family_that_megatron_cannot_express_does_not_claim_it_can():
    with pytest.raises(ValueError, match="Megatron's MLP"):
        Family(name="toy", architecture=toy_family.TOY.architecture, megatron=True)
