"""Growths as state maps: their checks, their fills, and their optimizer rules."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from megagrow.config import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import GrowthBlock
from megagrow.growth.operators.width import Width
from megagrow.growth.optimizer_rules import Factors, OptimizerRules, YoungBlocks, group_keys
from megagrow.growth.plan import grown_model, make_growth, plan_growth
from megagrow.growth.policy import POLICIES
from megagrow.growth.registry import OPERATORS, find_operator, find_policy
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS, Catalog
from megagrow.transfer.state_map import AxisMap
from tests.toys import (
    FAMILIES,
    build,
    grow,
    growths,
    larger,
    random_state,
    token_batches,
    toy_model,
)


def _growth(model, operator, policy=None, factor=2, rewarm=None):
    grown = larger(model, operator, factor)
    return make_growth(
        operator=operator,
        policy=policy,
        small=build_catalog(model),
        target=build_catalog(grown),
        rewarm=rewarm,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("operator", "policy", "factor"), growths(fractions=True))
def test_blocks_fill_the_target_without_overlap(operator, policy, factor, family):
    growth = _growth(toy_model(family=family), operator, policy, factor)
    for tensor in growth.target:
        seen = set()
        count = copied = 0
        for block in growth.blocks(tensor):
            axes = [
                range(a.target_start, a.target_start + a.length * a.target_step, a.target_step)
                for a in block.axes
            ]
            assert len(axes) == len(tensor.shape)
            indices = list(itertools.product(*axes))
            seen.update(indices)
            count += len(indices)
            copied += len(indices) * (block.param != 0.0)
        assert count == len(seen) <= tensor.volume
        covered = growth.fill(tensor, ADAM_SLOTS[0]) == "covered"
        assert covered == (copied == tensor.volume)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_first_policy_is_the_default(operator):
    assert _growth(toy_model(), operator).policy.name == OPERATORS[operator].policies[0]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_every_operator_explains_itself(operator):
    assert operator.name and operator.summary and operator.breaker and operator.source
    assert all(find_policy(name).summary for name in operator.policies)


def test_unknown_names_get_the_nearest():
    with pytest.raises(GrowthError, match=r"set grow\.operator to width"):
        find_operator("widht")
    with pytest.raises(GrowthError, match=r"set grow\.state_policy to exact"):
        find_policy("exakt")
    with pytest.raises(GrowthError, match="one of the names above"):
        find_operator("zzzzzz")


def test_a_policy_must_fit_its_operator():
    with pytest.raises(GrowthError, match="does not support 'exact'") as caught:
        _growth(toy_model(), "depth_stack", "exact")
    assert "copy or kept or sparkling or reset" in str(caught.value)
    with pytest.raises(GrowthError, match="no such state policy"):
        _growth(toy_model(), "depth_stack", "nonsense")


def test_a_policy_that_follows_the_gradient_needs_one():
    block = GrowthBlock("w", (AxisMap(0, 1, 0, 1, 4),))
    with pytest.raises(GrowthError, match="states no gradient"):
        find_policy("exact").coefficient(block, "first_moment")


def test_width_refuses_a_target_that_is_no_multiple():
    with pytest.raises(GrowthError, match="cannot grow from 8 to 12"):
        make_growth(
            operator="width",
            policy="exact",
            small=build_catalog(toy_model()),
            target=build_catalog(toy_model(hidden=12, ffn=24)),
        )


def test_a_block_outside_its_target_is_found(monkeypatch):
    outside = GrowthBlock("embedding.token", (AxisMap(0, 1, 0, 1, 13), AxisMap(9, 1, 0, 1, 8)))
    monkeypatch.setattr(Width, "blocks", lambda *_: (outside,))
    with pytest.raises(GrowthError, match="reaches outside"):
        _growth(toy_model(), "width")


def test_grown_shapes():
    wide = grown_model(toy_model(), operator="width", factor=3)
    assert (wide.hidden, wide.heads, wide.ffn, wide.layers) == (24, 6, 36, 2)
    assert wide.head_dim == toy_model().head_dim
    assert grown_model(toy_model(), operator="depth_stack", factor=3).layers == 6


# --- rules --------------------------------------------------------------------------------


def test_sparkling_marks_the_new_blocks_young():
    rules = _growth(toy_model(), "width", "sparkling", rewarm=7).rules_after(
        OptimizerRules(), step=30
    )
    up = rules.young["layers.0.mlp.up.weight"]  # [ffn, embed]: 12 x 8 became 24 x 16
    assert up == YoungBlocks(kept=((0, 2, 12), (0, 1, 8)), born=30, peak=1.3, rewarm=7)
    assert set(rules.young) == {t.name for t in build_catalog(toy_model())}
    assert not rules.factors


def test_mup_divides_the_rates_of_matrices_by_the_growth_of_their_inputs():
    target = {"hidden": 16, "heads": 4, "ffn": 36}
    section = GrowConfig(operator="width", target=target, mup=True)
    model = toy_model(tie_embeddings=False)
    rules = plan_growth(section, model)[1].rules_after(OptimizerRules(), step=0)
    assert rules.factors_of("layers.0.mlp.up.weight") == Factors(lr=0.5, weight_decay=2.0)
    assert rules.factors_of("layers.0.mlp.down.weight").lr == pytest.approx(1 / 3)
    assert rules.factors_of("layers.0.attention.out.weight").lr == 0.5
    # The final norm carries the head's share, and so its rate.
    assert {rules.factors_of(f"final_norm.{kind}").lr for kind in ("weight", "bias")} == {0.5}
    for name in ("embedding.token", "output.weight", "layers.0.mlp.up.bias"):
        assert rules.factors_of(name) == Factors()
    fresh = section.model_copy(update={"operator": "width_random"})
    rules = plan_growth(fresh, model)[1].rules_after(OptimizerRules(), step=0)
    assert rules.factors_of("output.weight").lr == 0.5
    assert rules.factors_of("final_norm.weight") == Factors()
    with pytest.raises(GrowthError, match="sets the rates itself"):
        plan_growth(section.model_copy(update={"state_policy": "exact"}), model)


def test_the_default_rewarm_is_the_policys():
    rules = _growth(toy_model(), "width", "sparkling").rules_after(OptimizerRules(), step=0)
    assert {young.rewarm for young in rules.young.values()} == {250}


def test_old_elements_in_several_blocks_are_reported_as_one():
    """Queries, keys and values of wider heads are separate blocks; every k-th index is old."""
    rules = _growth(toy_model(), "head_dim", "kept", factor=3).rules_after(OptimizerRules(), step=4)
    qkv = rules.young["layers.0.attention.qkv.weight"]  # [kv_group, projection, head_dim, embed]
    assert qkv.kept == ((0, 1, 2), (0, 1, 3), (0, 3, 4), (0, 1, 8))
    assert (qkv.peak, qkv.born, qkv.lr_factor(5)) == (1.0, 4, 1.0)
    assert "layers.0.mlp.up.weight" not in rules.young


def test_what_no_block_covers_is_young():
    rules = _growth(toy_model(), "vocab").rules_after(OptimizerRules(), step=4)
    assert {name: y.kept for name, y in rules.young.items()} == {
        "embedding.token": ((0, 1, 13), (0, 1, 8))
    }
    rules = _growth(toy_model(), "depth_identity").rules_after(OptimizerRules(), step=4)
    assert {name.split(".")[1] for name in rules.young} == {"1", "3"}
    assert all(young.kept is None for young in rules.young.values())


def test_factors_multiply_and_follow_copies():
    model = toy_model()
    first = _growth(model, "width", "exact").rules_after(OptimizerRules(), step=3)
    wide = grown_model(model, operator="width", factor=2)
    second = _growth(wide, "width", "exact", factor=3).rules_after(first, step=9)
    assert second.factors_of("layers.0.mlp.up.weight") == Factors(1 / 6, 6.0, 1 / 6)
    deeper = _growth(wide, "depth_stack").rules_after(first, step=9)
    for layer in range(4):
        assert deeper.factors_of(f"layers.{layer}.mlp.up.weight") == Factors(0.5, 2.0, 0.5)


def test_young_blocks_stay_young_where_they_are_copied_whole():
    model = toy_model()
    first = _growth(model, "width", "sparkling").rules_after(OptimizerRules(), step=3)
    wide = grown_model(model, operator="width", factor=2)
    deeper = _growth(wide, "depth_stack", "copy").rules_after(first, step=9)
    assert deeper.young["layers.3.mlp.up.weight"] == first.young["layers.1.mlp.up.weight"]
    wider = _growth(wide, "width", "sparkling").rules_after(first, step=9)
    assert {young.born for young in wider.young.values()} == {9}
    # The new blocks of the earlier growth keep their step count inside the later one's old block.
    up = wider.young["layers.0.mlp.up.weight"]  # [ffn, embed]: 12 x 8, 24 x 16, 48 x 32
    assert up.kept == ((0, 2, 24), (0, 1, 16))
    assert (up.inside.kept, up.inside.born, up.inside.inside) == (((0, 4, 12), (0, 1, 8)), 3, None)
    assert OptimizerRules.from_json(json.loads(json.dumps(wider.to_json()))) == wider


def test_young_blocks_are_not_copied_among_old_ones_before_their_moments_are_grown_up():
    model = toy_model()
    first = _growth(model, "width", "kept").rules_after(OptimizerRules(), step=1000)
    second = _growth(grown_model(model, operator="width", factor=2), "width", "copy")
    with pytest.raises(GrowthError, match="a growth 20 optimizer steps after that one"):
        second.rules_after(first, step=1020, betas=(0.9, 0.999))
    assert not second.rules_after(first, step=1000 + 6000, betas=(0.9, 0.999)).young
    assert not second.rules_after(first, step=1020).young  # an optimizer without bias correction


def test_no_block_is_born_after_the_step_count_starts_again():
    """`reset` counts steps from 0, so a block born at step 3 would have a negative age."""
    model = toy_model()
    first = _growth(model, "width", "sparkling").rules_after(OptimizerRules(), step=3)
    wide = grown_model(model, operator="width", factor=2)
    for operator in OPERATORS:
        assert not _growth(wide, operator, "reset").rules_after(first, step=9).young


@pytest.mark.parametrize(
    ("rewarm", "step", "factor"),
    [(10, 101, 1.03), (10, 105, 1.15), (10, 110, 1.3), (10, 500, 1.3), (0, 101, 1.3)],
)
def test_young_blocks_climb_to_their_peak(rewarm, step, factor):
    young = YoungBlocks(kept=None, born=100, peak=1.3, rewarm=rewarm)
    assert young.lr_factor(step) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("policy", ["sparkling", "exact"])
def test_rules_survive_json(policy):
    rules = _growth(toy_model(), "width", policy).rules_after(OptimizerRules(), step=30)
    assert OptimizerRules.from_json(json.loads(json.dumps(rules.to_json()))) == rules
    whole_new = OptimizerRules(young={"a": YoungBlocks(None, 1, 1.3, 5)})
    assert OptimizerRules.from_json(json.loads(json.dumps(whole_new.to_json()))) == whole_new


def test_groups_put_decay_first_and_part_factors():
    catalog = build_catalog(toy_model())
    rules = OptimizerRules({"layers.0.mlp.up.weight": Factors(0.5, 2.0, 0.5)})
    keys = group_keys(catalog, rules)
    assert keys["embedding.token"] == (False, 1.0, 1.0, 1.0, False)
    assert keys["layers.0.mlp.up.weight"] == (False, 0.5, 2.0, 0.5, False)
    assert keys["final_norm.weight"] == (True, 1.0, 1.0, 1.0, False)
    assert sorted(set(keys.values()))[-1][0] is True


def test_exact_says_what_keeps_it_from_retracing_the_small_run():
    """Clipping, and dropout: the copies of a unit are dropped independently."""
    exact = find_policy("exact")
    assert exact.caveat(grad_clip=0.0, dropout=0.0) is None
    clipped = exact.caveat(grad_clip=1.0, dropout=0.0)
    dropped = exact.caveat(grad_clip=0.0, dropout=0.1)
    assert "optimizer.grad_clip=0" in clipped and "dropout" not in clipped
    assert "model.dropout=0" in dropped and "clip" not in dropped
    assert exact.caveat(grad_clip=1.0, dropout=0.1) == f"{clipped}; and {dropped}"
    for name in POLICIES:
        assert name == "exact" or find_policy(name).caveat(grad_clip=1.0, dropout=0.1) is None


def test_under_dropout_exact_does_not_retrace_the_small_run():
    """So the caveat is true, and no other random numbers are drawn in a step."""
    model = toy_model(dropout=0.1)
    [batch] = torch.from_numpy(token_batches(model, samples=4, seed=3))
    state = random_state(build_catalog(model), seed=2)
    large, _, grown = grow(model, state, operator="width", policy="exact")
    losses = []
    for one, values in ((model, state), (large, grown)):
        torch.manual_seed(1)
        losses.append(build(one, values)(batch).item())
        with_none = build(one.model_copy(update={"dropout": 0.0}), values)
        assert with_none(batch).item() == with_none(batch).item() != losses[-1]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_a_tensor_of_which_nothing_is_known_does_not_grow():
    small, target = (build_catalog(toy_model(hidden=n)) for n in (8, 16))
    odd = target.tensors[0]
    target = Catalog((replace(odd, role="other"), *target.tensors[1:]))
    with pytest.raises(GrowthError, match=f"no operator knows what {odd.name} is"):
        make_growth(operator="width", policy=None, small=small, target=target)
