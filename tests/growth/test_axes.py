"""Heads and rotary positions: the correct growth, and that the naive ones are wrong."""

import pytest
import torch

from megagrow.config import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import resized
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.transfer.whole_state import MemoryState
from tests.toys import FAMILIES, build, grow, mapped, random_state, token_batches, toy_model


def _logits(model, state):
    tokens = torch.from_numpy(token_batches(toy_model(), samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        return build(model, state).logits(tokens)


def _replaced(model, state, change):
    """A state of `model` whose tensors are `change(name, old tensor)`."""
    new = MemoryState.empty(build_catalog(model), ADAM_SLOTS[:1], dtype=torch.float64)
    for name, slot in new.tensors:
        new.tensors[name, slot] = change(name, state.tensors[name, slot])
    return new


def _grouped(family):
    return toy_model(family=family, heads=8, kv_heads=2, head_dim=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_query_heads_concatenated_over_the_groups_are_wrong(family):
    model = _grouped(family)
    state = random_state(build_catalog(model), seed=1)
    large, _, right = grow(model, state, operator="kv_groups")
    assert (large.heads, large.kv_groups) == (16, 2)

    def naive(name, old):
        if ".qkv." in name:
            queries, shared = old[:, :4], old[:, 4:]
            heads = torch.cat([queries.flatten(0, 1)] * 2)  # q0 ... q7 q0 ... q7
            return torch.cat([heads.view(2, 8, *queries.shape[2:]), shared], dim=1)
        if name.endswith("attention.out.weight"):
            heads = torch.cat([old.flatten(1, 2)] * 2, dim=1) / 2
            return heads.view(old.shape[0], 2, 8, old.shape[-1])
        return old

    before = _logits(model, state)
    assert (_logits(large, right) - before).abs().max() <= 1e-10
    assert (_logits(large, _replaced(large, state, naive)) - before).abs().max() > 0.1


@pytest.mark.parametrize(("family", "wrong"), [("llama", True), ("gpt2", False)])
def test_duplicated_head_features_are_wrong_under_rotary_positions(family, wrong):
    model = toy_model(family=family)
    state = random_state(build_catalog(model), seed=1)
    large, _, right = grow(model, state, operator="head_dim")

    def naive(name, old):
        if ".qkv." in name:
            twice = torch.cat([old, old], dim=2)
            twice[:, 0] /= 2**0.5
            return twice
        if name.endswith("attention.out.weight"):
            return torch.cat([old, old], dim=3) / 2
        return old

    before = _logits(model, state)
    assert (_logits(large, right) - before).abs().max() <= 1e-10
    off = (_logits(large, _replaced(large, state, naive)) - before).abs().max()
    assert off > 0.1 if wrong else off <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_softmax_scale_of_wider_heads_is_compensated(family):
    model = toy_model(family=family)
    state = random_state(build_catalog(model), seed=1)
    large, _, right = grow(model, state, operator="head_dim")
    unscaled = MemoryState({key: value.clone() for key, value in right.tensors.items()})
    for (name, _), values in unscaled.tensors.items():
        if ".qkv." in name:
            values[:, 0] /= 2**0.5
    assert (_logits(large, unscaled) - _logits(model, state)).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [4, 8])
def test_key_value_heads_split_up(family, groups):
    model = _grouped(family)
    state = random_state(build_catalog(model), seed=1)
    grow_section = GrowConfig(operator="kv_groups", target={"kv_heads": groups})
    large, growth = plan_growth(grow_section, model)
    assert (large.heads, large.kv_groups) == (8, groups)
    new = mapped(growth, build_catalog(model), state)
    assert (_logits(large, new) - _logits(model, state)).abs().max() <= 1e-10


def test_split_heads_scatter_the_old_ones():
    section = GrowConfig(operator="kv_groups", target={"kv_heads": 4}, state_policy="sparkling")
    with pytest.raises(GrowthError, match="scatters the old elements") as caught:
        plan_growth(section, _grouped("llama"))
    assert "set grow.state_policy to copy or reset" in str(caught.value)


def test_queries_must_share_out():
    model = toy_model(heads=6, kv_heads=2, head_dim=4)
    with pytest.raises(GrowthError, match="do not share out"):
        plan_growth(GrowConfig(operator="kv_groups", target={"kv_heads": 6, "heads": 12}), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_wider_heads_comes_alive(family):
    """After two steps of plain gradient descent every new feature has a gradient."""
    model = toy_model(family=family)
    state = random_state(build_catalog(model), seed=1)
    large, _, new = grow(model, state, operator="head_dim")
    module = build(large, new)
    samples = torch.from_numpy(token_batches(model, samples=4, seed=3)[0])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(samples).backward()
        optimizer.step()
    block = module.layers[1].attention
    features = block.qkv.weight.grad.abs().amax(dim=(0, 3))  # [projection, head_dim]
    assert (features > 1e-6).all()
    assert (block.out.weight.grad.abs().amax(dim=(0, 1, 2)) > 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_an_identity_layer_comes_alive(family):
    model = toy_model(family=family)
    state = random_state(build_catalog(model), seed=1)
    large, _, new = grow(model, state, operator="depth_identity")
    module = build(large, new)
    samples = torch.from_numpy(token_batches(model, samples=4, seed=3)[0])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(samples).backward()
        optimizer.step()
    for name, parameter in module.layers[2].named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize(("family", "dead"), [("llama", True), ("gpt2", False)])
def test_identity_layers_by_zero_norm_gains_have_a_dead_mlp(family, dead):
    """As in the paper: without biases nothing in the MLP ever gets a gradient."""
    model = toy_model(family=family)
    state = random_state(build_catalog(model), seed=1)
    large, _, new = grow(model, state, operator="depth_stack")
    module = build(large, new)
    copy = module.layers[3]
    with torch.no_grad():
        for part in (copy.attention, copy.mlp):
            part.norm.weight.zero_()
            for parameter in part.parameters():
                if parameter.dim() == 1:
                    parameter.zero_()
    samples = torch.from_numpy(token_batches(model, samples=4, seed=3)[0])
    module(samples).backward()
    gradient = max(float(p.grad.abs().max()) for p in copy.mlp.parameters())
    assert gradient == 0.0 if dead else gradient > 1e-6


def test_a_model_keeps_the_width_of_its_heads():
    model = toy_model()
    assert resized(model, {"hidden": 16}).head_dim == model.head_dim
    assert resized(model, {"hidden": 16, "heads": 4}).head_dim_ is None
    with pytest.raises(GrowthError, match="there is no model with kv_heads 3"):
        resized(model, {"kv_heads": 3})
