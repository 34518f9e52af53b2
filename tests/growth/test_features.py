"""The laws of loss and gradient for what families have beyond plain models."""

import numpy as np
import pytest
import torch

from megagrow.config.growths import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.features import refusal
from megagrow.growth.plan import make_growth, plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from tests.toys import (
    build,
    featured_models,
    growths,
    larger,
    mapped,
    random_state,
    token_batches,
    toy_model,
)

MODELS = featured_models(norm_eps=1e-12, layers=4)
# The eps of norms after sub-layers does not grow with their mean square: see width_fresh.
BOUNDS = {"gemma2": 1e-9}
CASES = [
    (family, operator, factor)
    for family in MODELS
    for operator, _, factor in growths(policies=False, keeps="loss", fractions=True)
    if factor in (2, 1.5)
]


def _planned(model, operator, factor):
    """The growth; None where the operator refuses, as it must before anything is read."""
    grown = larger(model, operator, factor)
    error = refusal(OPERATORS[operator], model, grown)
    if error is not None:
        with pytest.raises(GrowthError, match="has no rule for"):
            plan_growth(_section(operator, model, grown), model)
        return None
    small, target = build_catalog(model), build_catalog(grown)
    return grown, make_growth(operator=operator, policy=None, small=small, target=target)


def _section(operator, model, grown):
    keys = OPERATORS[operator].sizes
    old, new = (m.model_dump(by_alias=True) for m in (model, grown))
    target = {key: new[key] for key in keys if new[key] != old[key]}
    return GrowConfig(operator=operator, target=target)


def _before_and_after(family, operator, factor):
    """(growth, small module, grown module); None where the operator refuses."""
    model = MODELS[family]
    found = _planned(model, operator, factor)
    if found is None:
        return None
    grown, growth = found
    state = random_state(build_catalog(model), seed=1)
    new = mapped(growth, build_catalog(model), state)
    return growth, build(model, state), build(grown, new, growth.ramp)


@pytest.mark.parametrize(("family", "operator", "factor"), CASES)
def test_operators_keep_the_logits_or_refuse(family, operator, factor):
    found = _before_and_after(family, operator, factor)
    if found is None:
        return
    _, small, large = found
    tokens = torch.from_numpy(token_batches(MODELS[family], samples=3, seed=2)[0])[:, :-1]
    with torch.no_grad():
        before, after = small.logits(tokens), large.logits(tokens)
    assert before.std() > 0.1
    assert (after - before).abs().max() <= BOUNDS.get(family, 1e-10)


@pytest.mark.parametrize(("family", "operator", "factor"), CASES)
def test_gradients_are_the_stated_multiples(family, operator, factor):
    found = _before_and_after(family, operator, factor)
    if found is None:
        return
    growth, small, large = found
    samples = torch.from_numpy(token_batches(MODELS[family], samples=3, seed=3)[0])
    small(samples).backward()
    large(samples).backward()
    old = {name: p.grad.numpy() for name, p in named_tensors(small).items()}
    for name, parameter in named_tensors(large).items():
        gradient = parameter.grad.numpy()
        for block in growth.blocks(growth.target[name]):
            if block.grad is None:
                continue
            there = np.ix_(*[range(a.target_start, a.target_start + a.length * a.target_step,
                                   a.target_step) for a in block.axes])  # fmt: skip
            here = np.ix_(*[range(a.source_start, a.source_start + a.length * a.source_step,
                                  a.source_step) for a in block.axes])  # fmt: skip
            np.testing.assert_allclose(
                gradient[there], block.grad * old[block.source][here], rtol=0,
                atol=10 * BOUNDS.get(family, 1e-10), err_msg=f"{name}, {block}",
            )  # fmt: skip


def test_every_feature_has_an_operator_that_makes_the_model_wider_or_deeper():
    for family, model in MODELS.items():
        wider = OPERATORS["width_fresh"].grown(model, {"hidden": 16, "head_dim": model.head_dim})
        assert refusal(OPERATORS["width_fresh"], model, wider) is None, family
        _, growth = plan_growth(GrowConfig(operator="depth_identity", factor=2), model)
        assert growth.operator.keeps == "loss"


@pytest.mark.parametrize("operator", ["depth_identity", "depth_interleave", "depth_stack"])
def test_layers_are_built_from_layers_of_their_kind(operator):
    model = MODELS["gemma2"]
    grown, growth = plan_growth(GrowConfig(operator=operator, factor=2), model)
    for tensor in growth.target:
        for block in growth.blocks(tensor):
            assert growth.small[block.source].kind == tensor.kind
    assert grown.layer_kind(1) != grown.layer_kind(0)
    with pytest.raises(GrowthError, match="attends in another way"):
        plan_growth(GrowConfig(operator=operator, target={"layers": 5}), model.model_copy(
            update={"layers": 3}))  # fmt: skip


def test_norms_of_heads_keep_their_eps():
    model = toy_model(family="qwen3", norm_eps=1e-3)
    wide = OPERATORS["width_fresh"].grown(model, {"hidden": 16})
    assert (wide.norm_eps, wide.head_norm_eps) == (5e-4, 1e-3)
    again = OPERATORS["width_fresh"].grown(wide, {"hidden": 32})
    assert (again.norm_eps, again.head_norm_eps) == (2.5e-4, 1e-3)


def test_gains_that_add_one_are_scaled_as_a_whole():
    model = MODELS["gemma2"]
    state = random_state(build_catalog(model), seed=1)
    wider = GrowConfig(operator="width_fresh", target={"hidden": 16, "heads": 4})
    _, growth = plan_growth(wider, model)
    new = mapped(growth, build_catalog(model), state)
    name = "layers.0.attention.norm.weight"
    old, wide = state.tensors[name, "master"], new.tensors[name, "master"]
    torch.testing.assert_close(1 + wide[:8], (1 + old) * 0.5**0.5)
    torch.testing.assert_close(1 + wide[8:], (1 + old.mean()).expand(8) * 0.5**0.5)
