"""`width_fresh` against its formulas, element by element, and its effect on the model's eps."""

import numpy as np
import pytest
import torch

from megagrow.config import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.optimizer_rules import Factors, OptimizerRules
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from megagrow.state.boxes import whole
from megagrow.state.catalog import MASTER
from megagrow.state.fresh import normals
from tests.growth.models import MODELS
from tests.toys import FAMILIES, build, grow, random_state, token_batches, toy_model

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
READERS = ("qkv.weight", "up.weight", "output.weight")


def _parts(tensor, old):
    """Index of the old elements: at the start of each axis, queries at the end."""
    return tuple(
        slice(large - n, large) if axis in ("query", "projection") else slice(0, n)
        for axis, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True)
    )


@every_model
def test_every_tensor_is_padded_as_its_role_says(model):
    state = random_state(build_catalog(model), seed=1)
    _, growth, new = grow(model, state, operator="width_fresh", factor=2)
    centred = model.architecture.norm == "layer"
    for tensor in growth.target:
        old = growth.small[tensor.name]
        before = state.tensors[tensor.name, "master"]
        after = new.tensors[tensor.name, "master"]
        inside = torch.zeros(tensor.shape, dtype=torch.bool)
        inside[_parts(tensor, old)] = True
        rest = after[~inside]
        if tensor.name.endswith("norm.weight"):
            torch.testing.assert_close(after[inside].view(old.shape), before / 2**0.5)
            torch.testing.assert_close(rest, (before.mean() / 2**0.5).expand(8))
            continue
        assert torch.equal(after[inside].view(old.shape), before)
        if tensor.name.endswith(READERS):
            rms = before.square().mean().sqrt()
            assert rest.std() == pytest.approx(rms.item(), rel=0.25)
            assert abs(rest.mean()) < 0.3 * rms and len(set(rest.tolist())) == rest.numel()
        elif centred and "embed" in tensor.axes and "norm" not in tensor.name:
            at = tensor.axes.index("embed")
            means = before.mean(at, keepdim=True).expand(old.shape)
            within = list(_parts(tensor, old))
            within[at] = slice(None)
            torch.testing.assert_close(after.narrow(at, 8, 8)[tuple(within)], means)
            assert after.count_nonzero() == 2 * before.count_nonzero()
        else:
            assert not rest.any()


@every_model
def test_all_that_is_new_learns_from_the_second_step_on(model):
    """Writers and embeddings at the first step, readers once their outputs are read."""
    state = random_state(build_catalog(model), seed=1)
    large, _, new = grow(model, state, operator="width_fresh", factor=2)
    module = build(large, new)
    samples = torch.from_numpy(token_batches(model, samples=16, seed=3)[0])
    named = named_tensors(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(samples).backward()
        optimizer.step()
    for name, parameter in named.items():
        if name.endswith("qkv.bias"):  # a key's bias never has a gradient
            continue
        seen = parameter.grad != 0
        if name == "embedding.token":
            seen = seen[torch.unique(samples[:, :-1])]
        assert seen.double().mean() > 0.99, name


def test_the_random_numbers_are_not_those_that_the_tensor_began_with():
    """Otherwise a new column would equal the initial values of the next row."""
    model = toy_model()
    state = random_state(build_catalog(model), seed=1)
    name = "layers.0.mlp.up.weight"
    _, growth, new = grow(model, state, operator="width_fresh", factor=2)
    first = normals((12, 8), whole((12, 8)), name=name, seed=0)
    added = new.tensors[name, "master"].numpy()[:12, 8:]
    for row in added:
        assert all(abs(np.corrcoef(row, start)[0, 1]) < 0.999 for start in first)
    assert growth.fill(growth.target[name], MASTER).name == f"{name} [24, 16]"


@pytest.mark.parametrize("family", FAMILIES)
def test_eps_falls_as_the_mean_square_of_the_stream_does(family):
    model = toy_model(family=family, norm_eps=1e-3)
    target = {"hidden": 12, "ffn": 13}
    large, _ = plan_growth(GrowConfig(operator="width_fresh", target=target), model)
    assert large.norm_eps == pytest.approx(1e-3 * 8 / 12, rel=1e-15)
    same, _ = plan_growth(GrowConfig(operator="width_fresh", target={"ffn": 13}), model)
    assert same.norm_eps == model.norm_eps
    composed = GrowConfig(operator="depth_stack+width_fresh", target={"layers": 3, "hidden": 16})
    assert plan_growth(composed, model)[0].norm_eps == pytest.approx(5e-4, rel=1e-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_old_eps_the_function_would_change(family):
    """So eps is part of the growth: a large value shows it."""
    model = toy_model(family=family, norm_eps=0.05)
    state = random_state(build_catalog(model), seed=1)
    large, _, new = grow(model, state, operator="width_fresh", factor=2)
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        before = build(model, state).logits(tokens)
        assert (build(large, new).logits(tokens) - before).abs().max() <= 1e-10
        other = large.model_copy(update={"norm_eps": model.norm_eps})
        assert (build(other, new).logits(tokens) - before).abs().max() > 1e-3


def test_mup_leaves_the_final_norm_alone():
    """Its gains fall because its input's scale changed, not to carry a share of the head's."""
    model = toy_model(family="llama", tie_embeddings=False)
    section = GrowConfig(operator="width_fresh", factor=2, mup=True)
    rules = plan_growth(section, model)[1].rules_after(OptimizerRules(), step=0)
    assert rules.factors_of("final_norm.weight") == Factors()
    assert rules.factors_of("output.weight").lr == 0.5
    assert rules.factors_of("layers.0.mlp.up.weight").lr == 0.5


def test_the_old_block_keeps_its_moments_and_the_rest_is_young():
    model = toy_model(family="llama")
    _, growth = plan_growth(GrowConfig(operator="width_fresh", factor=2), model)
    assert growth.policy.name == "kept"
    rules = growth.rules_after(OptimizerRules(), step=7)
    assert set(rules.young) == {tensor.name for tensor in growth.target}
    up = rules.young["layers.0.mlp.up.weight"]  # [gate_up, ffn, embed]
    assert (up.kept, up.born, up.peak) == (((0, 1, 2), (0, 1, 12), (0, 1, 8)), 7, 1.0)
    assert not rules.factors


@pytest.mark.parametrize("policy", ["exact", "copy", "shen"])
def test_policies_that_need_copies_are_refused(policy):
    section = GrowConfig(operator="width_fresh", state_policy=policy)
    with pytest.raises(GrowthError, match="does not support"):
        plan_growth(section, toy_model())


def test_more_key_value_heads_alone_would_take_old_query_heads_from_theirs():
    model = toy_model(family="llama", heads=4, kv_heads=2)
    section = GrowConfig(operator="width_fresh", target={"kv_heads": 4})
    with pytest.raises(GrowthError, match="fewer query heads to a key/value head"):
        plan_growth(section, model)
    together = GrowConfig(operator="width_fresh", target={"kv_heads": 4, "heads": 8})
    both, _ = plan_growth(together, model)
    assert (both.kv_groups, both.heads) == (4, 8)
