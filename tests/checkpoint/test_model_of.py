"""The model of a checkpoint follows from the run's first model and its growths alone."""

import ast
from pathlib import Path

import pytest

from megagrow.checkpoint.convert.load_model import load_model
from megagrow.checkpoint.convert.summary import describe
from megagrow.checkpoint.interface import model_of as shapes
from megagrow.checkpoint.interface.model_of import (
    NOT_OF_THE_FUNCTION,
    catalog_for,
    model_of,
    recorded_model,
)
from megagrow.config.growths import SIZES, GrowConfig
from megagrow.config.model import MODEL_SETTINGS
from megagrow.errors import CheckpointError
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import LogicalTensor
from megagrow.train.grow_offline import plan_offline, write_offline
from tests.checkpoint.grown import HISTORIES, save_grown
from tests.checkpoint.states import opened, save_model
from tests.toys import toy_model

ROOT = Path(__file__).parent.parent.parent
FILES = sorted([*(ROOT / "megagrow").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])


def reads_model_section(node):
    """`config["model"]` or `config.get("model")`, under any variable name."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        key, owner = node.slice, node.value
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get", "pop")
        and node.args
    ):
        key, owner = node.args[0], node.func.value
    else:
        return False
    return isinstance(key, ast.Constant) and key.value == "model" and "conf" in ast.unparse(owner)


def test_nothing_but_shape_reads_the_model_section_of_a_configuration():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if reads_model_section(node)
    ]
    assert [place.rpartition(":")[0] for place in found] == [
        "megagrow/checkpoint/interface/model_of.py"
    ], found


@pytest.mark.parametrize("history", HISTORIES)
def test_every_reader_sees_the_model_as_it_has_grown(history, tmp_path):
    path, model = save_grown(tmp_path, history)
    source = opened(path)
    assert model_of(source) == model
    assert load_model(path)[1].layers == model.layers
    shown = describe(source, format_name="native", checksums="")
    [row] = [line for line in shown.splitlines() if line.startswith("model ")]
    assert f"layers {model.layers}, hidden {model.hidden}, heads {model.heads}" in row
    grown = len(HISTORIES[history][0])
    assert (f"in growth stage {grown}" in row) == (grown > 0)


def test_a_checkpoint_grown_offline_tells_its_model(tmp_path):
    path, model = save_grown(tmp_path / "run", "wider")
    plan = plan_offline(path, GrowConfig(operator="depth_stack", factor=2))
    assert plan.small == model
    deeper = opened(write_offline(plan, tmp_path / "out"))
    assert model_of(deeper) == plan.model and plan.model.layers == 2 * model.layers


def test_a_configuration_that_does_not_lead_to_the_tensors_is_refused(tmp_path):
    source = opened(save_grown(tmp_path, "twice")[0])

    class Changed:
        catalog, config, run_state = source.catalog, source.config, source.run_state

    Changed.run_state = {**source.run_state, "growth_stage": 1}
    with pytest.raises(CheckpointError, match="describes another model"):
        model_of(Changed)
    Changed.run_state = {**source.run_state, "growth_stage": 3}
    with pytest.raises(CheckpointError, match="growth stage 3, and stages are 3"):
        recorded_model(Changed)
    Changed.config = {}
    assert recorded_model(Changed) is None
    with pytest.raises(CheckpointError, match="does not say which model it holds"):
        model_of(Changed)


def test_a_checkpoint_from_before_tensors_had_roles_is_read_as_today(tmp_path, monkeypatch):
    model = toy_model(tie_embeddings=False)
    today = LogicalTensor.to_json

    def before(tensor):
        return {k: v for k, v in today(tensor).items() if k not in ("role", "reads", "centred")}

    with monkeypatch.context() as patched:
        patched.setattr(LogicalTensor, "to_json", before)
        path, _ = save_model(tmp_path, model)
    assert '"role"' not in (path / "manifest.json").read_text()
    assert opened(path).catalog == build_catalog(model)


# What a run may set otherwise than the weights that it starts from, and what it may not.
MAY = {"dropout": 0.3, "init_std": 0.07, "mup": {"hidden": 8}, "sequence": None, "vocab": None,
       "activation_checkpointing": "full", "compile": True}  # fmt: skip
MAY_NOT = {"family", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "tie_embeddings",
           "norm_eps", "rope_theta", "rope_scaling", "rope_fraction", "no_rope_every", "window",
           "full_every", "attention_scale", "attention_softcap", "logit_softcap",
           "head_norm_eps"}  # fmt: skip


def test_every_model_setting_is_compared_or_known_not_to_change_the_function():
    assert set(MAY) == NOT_OF_THE_FUNCTION
    assert set(MODEL_SETTINGS) == set(MAY) | MAY_NOT and not set(MAY) & MAY_NOT


class Told:
    """A model's tensors under a configuration."""

    def __init__(self, catalog, model):
        self.catalog, self.run_state = catalog, {"growth_stage": 0}
        self.config = {"model": model.model_dump(mode="json", by_alias=True)}


@pytest.mark.parametrize("key", [key for key, value in MAY.items() if value is not None])
def test_a_setting_of_training_may_differ_from_the_weights(key):
    model = toy_model(family="llama")
    catalog = build_catalog(model)
    run = toy_model(family="llama", **{key: MAY[key]})
    assert catalog_for(Told(catalog, run), Told(catalog, model)) == build_catalog(run)


@pytest.mark.parametrize("change", [{"norm_eps": 1e-6}, {"rope_theta": 5e5}], ids=str)
def test_a_setting_of_the_function_may_not_differ_from_the_weights(change):
    model = toy_model(family="llama")
    catalog = build_catalog(model)
    with pytest.raises(CheckpointError, match=f"model.{next(iter(change))}"):
        catalog_for(Told(catalog, toy_model(family="llama", **change)), Told(catalog, model))


def test_a_new_setting_is_compared_unless_it_is_listed(monkeypatch):
    model = toy_model(family="llama")
    catalog = build_catalog(model)
    run = toy_model(family="llama", dropout=0.3)
    monkeypatch.setattr(shapes, "NOT_OF_THE_FUNCTION", NOT_OF_THE_FUNCTION - {"dropout"})
    with pytest.raises(CheckpointError, match=r"model.dropout"):
        catalog_for(Told(catalog, run), Told(catalog, model))


def test_sizes_are_listed_once():
    whole_numbers = {key for key in MODEL_SETTINGS if type(toy_model().effective(key)) is int}
    assert set(SIZES) == whole_numbers
    assert {size for operator in OPERATORS.values() for size in operator.sizes} <= set(SIZES)
