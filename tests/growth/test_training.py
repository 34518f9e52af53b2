"""What a stage trains (`stages[i].train`): which tensors, what is refused, what the rules say."""

import pytest

from megagrow.config import Config
from megagrow.config.load import parse_settings
from megagrow.errors import ConfigError
from megagrow.growth.new_blocks import retrained
from megagrow.growth.optimizer_rules import FROZEN, OptimizerRules, group_keys
from megagrow.growth.training import trained_catalog
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS, MASTER, MUON_SLOTS, Catalog, slots_of
from megagrow.state.optimizers import MUON
from megagrow.train.run_plan import plan_run
from tests.toys import toy_model

DEEPER = {"operator": "depth_stack"}


def planned(*stages, model=None, **sections):
    sizes = {"layers": 2, "hidden": 8, "heads": 2, "ffn": 16, "sequence": 8, "vocab": 32}
    for number, stage in enumerate(stages, start=1):
        stage.setdefault("until", {"steps": 5 * number})
    given = {
        "model": {**sizes, **(model or {})}, "data": {"path": "nowhere"},
        "batch": {"global": 4, "micro": 2}, "stages": list(stages), **sections,
    }  # fmt: skip
    return plan_run(parse_settings(Config, given, source="run"), world=1, vocabulary=None)


def refused(*stages, **sections):
    with pytest.raises(ConfigError) as error:
        planned(*stages, **sections)
    return str(error.value)


def trained(stage):
    return {tensor.name for tensor in stage.catalog if tensor.training == "trained"}


@pytest.mark.parametrize(
    ("operator", "layers"),
    [("depth_stack", {2, 3}), ("depth_interleave", {1, 3}), ("depth_identity", {1, 3})],
)
def test_new_are_the_new_layers_of_depth_operators(operator, layers):
    _, stage = planned({}, {"grow": {"operator": operator}, "train": "new"}).stages
    assert trained(stage) == {t.name for t in stage.catalog if t.layer in layers}
    assert stage.growth.target == stage.catalog


def test_new_is_the_head_that_untie_adds():
    _, stage = planned({}, {"grow": {"operator": "untie"}, "train": "new"}).stages
    assert trained(stage) == {"output.weight"}


@pytest.mark.parametrize("operator", ["width", "width_fresh", "depth_stack+width", "vocab"])
def test_new_is_refused_where_old_and_new_share_a_tensor(operator):
    text = refused({}, {"grow": {"operator": operator}, "train": "new"})
    assert "stages[1].train: new, but" in text and "which has old ones as well" in text
    assert "one of depth alone, or untie" in text


def test_new_is_refused_where_nothing_is_new():
    assert "nothing is new in a stage without a growth" in refused({"train": "new"})
    assert "nothing is new in a stage without" in refused({}, {"train": "new"})
    ligo = {"operator": "ligo", "target": {"layers": 4}}
    assert "makes every tensor of fitted maps" in refused({}, {"grow": ligo, "train": "new"})


def test_lists_are_of_roles_and_names():
    plan = planned({"train": ["writer", "layers.0.*", "final_norm_gain"]})
    found = trained(plan.stages[0])
    catalog = build_catalog(plan.stages[0].model)
    assert found == {
        t.name for t in catalog if t.role in ("writer", "final_norm_gain") or t.layer == 0
    }


@pytest.mark.parametrize(
    ("name", "close"),
    [("writers", "writer"), ("layers.7.*", "layers."), ("embeding.token", "embedding.token")],
)
def test_unknown_names_are_refused_with_suggestions(name, close):
    text = refused({"train": [name]})
    assert f"stages[0].train: '{name}' is neither the role nor the name" in text
    assert close in text.partition("fix:")[2] or "launch/inspect.py" in text
    assert "although it is a role" in refused({"train": ["post_norm_gain"]})


def test_values_of_other_kinds_are_refused():
    for value in ("old", 3, [], [3]):
        with pytest.raises(ConfigError, match=r"stages\[0\].train"):
            planned({"train": value})


def test_what_is_not_given_does_not_change_but_a_growth_has_to_say():
    plan = planned({}, {"grow": DEEPER, "train": "new"}, {"batch": {"global": 8, "micro": 2}})
    assert plan.stages[2].catalog == plan.stages[1].catalog
    text = refused({}, {"grow": DEEPER, "train": "new"}, {"grow": DEEPER})
    assert "stages[2]: grows a model of which stages[1] trains a part" in text
    both = planned({}, {"grow": DEEPER, "train": "new"}, {"grow": DEEPER, "train": "all"})
    assert not both.stages[2].catalog.frozen and both.stages[2].growth.small.frozen


def test_rules_that_predict_are_refused_for_a_part():
    stage = {"until": {"marginal": True, "steps": 5}}
    text = refused(stage, {"grow": DEEPER, "train": "new", "until": {"steps": 9}})
    assert (
        "stages[0].until.marginal: predicts by laws of models that are trained as a whole" in text
    )


def test_the_optimizer_has_no_group_and_no_slots_of_frozen_tensors():
    every = build_catalog(toy_model())
    catalog = trained_catalog(["reader"], every, growth=None, index=0)
    keys = group_keys(catalog, OptimizerRules(), MUON)
    for tensor in catalog:
        assert (keys[tensor.name] == FROZEN) == (tensor.role != "reader")
        wanted = ADAM_SLOTS if tensor.role == "reader" else (MASTER,)
        assert slots_of(tensor, ADAM_SLOTS) == wanted
        assert slots_of(tensor, MUON_SLOTS) == wanted[:2]
    assert Catalog.from_json(catalog.to_json()) == catalog


def test_flops_fall_and_steps_in_flops_follow():
    plan = planned({}, {"grow": DEEPER, "train": "new"}, {"train": "all"})
    _, part, whole = (stage.plan.flops_per_step for stage in plan.stages)
    assert 0.4 * whole < part < 0.8 * whole


def test_unfrozen_tensors_count_their_own_steps():
    every = build_catalog(toy_model())
    part = trained_catalog(["writer"], every, growth=None, index=0)
    other = trained_catalog(["reader"], every, growth=None, index=0)
    frozen = retrained(OptimizerRules(), every, part, step=7)
    assert not frozen.young
    moved = retrained(frozen, part, other, step=9).young
    assert set(moved) == {t.name for t in every if t.role == "reader"}
    again = retrained(OptimizerRules(young=moved), other, every, step=12).young
    assert {one.born for name, one in again.items() if every[name].role == "reader"} == {9}
    assert {one.born for name, one in again.items() if every[name].role != "reader"} == {12}
    assert all(one.kept is None and one.lr_factor(20) == 1.0 for one in again.values())
    assert retrained(frozen, part, part, step=9) == frozen


def test_a_growth_of_frozen_tensors_makes_new_ones_of_them():
    """Inside the block that they become, and unless all moments start again."""
    wider = {"operator": "width", "state_policy": "sparkling"}
    stages = ({"train": ["writer"]}, {"grow": wider, "train": "all"})
    plan = planned(*stages)
    young = plan.rules_at(1).young
    tensor = young["layers.0.mlp.up.weight"]
    assert tensor.inside.kept is None and tensor.inside.born == tensor.born == 5
    assert young["layers.0.mlp.down.weight"].inside is None
    wider["state_policy"] = "reset"
    assert not planned(*stages).rules_at(1).young
