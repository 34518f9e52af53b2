"""Compositions and given targets: one growth instead of several, with the same result."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.execute import transfer_between_ranks
from megagrow.transfer.state_map import AxisMap, compose
from tests.growth.models import MODELS
from tests.toys import (
    FAMILIES,
    ShardState,
    ThreadChannel,
    build,
    mapped,
    on_threads,
    random_state,
    token_batches,
    toy_model,
)

axis_maps = st.builds(
    AxisMap,
    st.integers(0, 9), st.integers(1, 6), st.integers(0, 9), st.integers(1, 6), st.integers(1, 9),
)  # fmt: skip


def _pairs(axis):
    return {
        axis.target_start + u * axis.target_step: axis.source_start + u * axis.source_step
        for u in range(axis.length)
    }


@settings(max_examples=500, deadline=None)
@given(outer=axis_maps, inner=axis_maps)
def test_axis_maps_compose_as_functions_do(outer, inner):
    late, early = _pairs(outer), _pairs(inner)
    expected = {target: early[middle] for target, middle in late.items() if middle in early}
    composed = compose(outer, inner)
    assert (_pairs(composed) if composed else {}) == expected


def _grown(model, state, **section):
    large, growth = plan_growth(GrowConfig(**section), model)
    return large, growth, mapped(growth, build_catalog(model), state)


COMPOSITIONS = [
    ("width", "depth_stack"),
    ("depth_stack", "width"),
    ("width", "depth_identity"),
    ("width_diag", "depth_interleave"),
    ("width_split", "head_dim"),
    ("depth_stack", "width_noise"),
    ("width", "width_diag"),
    ("width", "vocab"),
    ("sequence", "depth_stack"),
    ("kv_groups", "width"),
    ("width", "depth_stack", "sequence"),
    ("depth_stack", "width_random"),
    ("width", "width_random"),
    ("depth_stack", "width_fresh"),
    ("depth_identity", "width_fresh"),
    ("depth_stack", "depth_interleave", "width_fresh"),
]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("parts", COMPOSITIONS, ids="+".join)
@pytest.mark.parametrize("policy", ["kept", "reset"])
def test_a_composition_equals_its_parts_one_after_the_other(parts, model, policy):
    small = random_state(build_catalog(model), seed=1)
    steps, middle = small, model
    for part in parts:
        middle, _, steps = _grown(middle, steps, operator=part, state_policy=policy)
    large, growth, at_once = _grown(model, small, operator="+".join(parts), state_policy=policy)
    assert large == middle and growth.operator.name == "+".join(parts)
    for key, values in steps.tensors.items():
        torch.testing.assert_close(at_once.tensors[key], values, rtol=1e-14, atol=0)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_a_composition_keeps_and_states(model):
    """Loss and gradients, through two operators that state them."""
    small = random_state(build_catalog(model), seed=1)
    large, growth, new = _grown(model, small, operator="width+width_diag", state_policy="exact")
    assert growth.operator.keeps == "loss" and "exact" in growth.operator.policies
    samples = torch.from_numpy(token_batches(model, samples=4, seed=3)[0])
    one, other = build(model, small), build(large, new)
    losses = one(samples), other(samples)
    assert abs(losses[0] - losses[1]) <= 1e-10
    for loss in losses:
        loss.backward()
    rules = growth.rules_after(OptimizerRules(), step=1)
    assert rules.factors_of("layers.0.mlp.up.weight").lr == pytest.approx(0.25)
    grads = {n: p.grad for n, p in named_tensors(other).items()}
    old = {n: p.grad for n, p in named_tensors(one).items()}
    for tensor in growth.target:
        for block in growth.blocks(tensor):
            copy = block.scaled(1.0)
            origin = (0,) * len(block.axes)
            part = whole(copy.shape)
            found = grads[tensor.name][copy.target_slices(part, origin)]
            expected = block.grad * old[block.source][copy.source_slices(part, origin)]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_only_all_parts_together_keep_the_loss():
    _, growth = plan_growth(GrowConfig(operator="width+depth_stack"), toy_model())
    assert growth.operator.keeps == "nothing"
    _, growth = plan_growth(GrowConfig(operator="width+vocab"), toy_model())
    assert growth.operator.keeps == "old logits"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"operator": "vocab+width"}, "name vocab last"),
        ({"operator": "width_random+depth_stack"}, "name width_random last"),
        ({"operator": "depth_identity+width_random"}, "in two ways"),
        ({"operator": "width_fresh+depth_stack"}, "name width_fresh last"),
        ({"operator": "width+width_fresh"}, "which the operators before it change"),
        ({"operator": "width_fresh", "target": {"ffn": 9}}, "cannot shrink"),
        ({"operator": "width_random", "target": {"ffn": 9}}, "cannot shrink"),
        ({"operator": "width_noise+width"}, "name the operator that adds noise last"),
        ({"operator": "width+depth_stack", "state_policy": "exact"}, "does not support 'exact'"),
        ({"operator": "width+nothing"}, "no such growth operator"),
        ({"operator": "width+kv_groups", "target": {"heads": 4}}, "both width and kv_groups"),
        ({"operator": "width", "target": {"sequence": 12}}, "no operator grows it"),
        ({"operator": "width", "target": {"hidden": 4}}, "cannot grow from 8 to 4"),
        ({"operator": "width_diag", "target": {"ffn": 24}}, "grow unevenly"),
        ({"operator": "vocab", "target": {"vocab": 9}}, "cannot shrink"),
    ],
)
def test_what_cannot_be_composed_or_reached_is_refused(section, said):
    with pytest.raises(GrowthError) as caught:
        plan_growth(GrowConfig(**section), toy_model())
    assert said in str(caught.value)


TARGETS = [
    ("width", {"hidden": 32, "heads": 6, "ffn": 48}),
    ("width_fresh", {"hidden": 11, "heads": 5, "ffn": 17}),
    ("width_fresh", {"hidden": 9}),
    ("width_fresh", {"heads": 3}),
    ("width_fresh", {"ffn": 13}),
    ("width_fresh", {"heads": 4, "kv_heads": 2}),
    ("depth_identity+width_fresh", {"layers": 3, "hidden": 20}),
    ("width_random", {"hidden": 11, "heads": 5, "ffn": 17}),
    ("width_random", {"hidden": 32, "ffn": 13}),
    ("width_random", {"heads": 4, "kv_heads": 2}),
    ("sequence+width_random", {"sequence": 9, "heads": 3}),
    ("kv_groups", {"heads": 8, "kv_heads": 2}),
    ("vocab+sequence", {"vocab": 14, "sequence": 24}),
    ("width", {"hidden": 16}),
    ("width", {"ffn": 36}),
    ("width", {"heads": 6}),
    ("width", {"hidden": 24, "heads": 4, "ffn": 12}),
    ("width_split", {"hidden": 16, "ffn": 48}),
    ("width_noise", {"hidden": 24, "ffn": 24}),
    ("depth_identity", {"layers": 5}),
    ("head_dim+depth_identity", {"head_dim": 8, "layers": 3}),
    ("width+sequence", {"hidden": 16, "sequence": 9}),
    ("vocab", {"vocab": 15}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("operator", "target"), TARGETS)
def test_given_targets_are_reached_with_the_loss_kept(operator, target, family):
    model = toy_model(family=family)
    small = random_state(build_catalog(model), seed=1)
    large, growth, new = _grown(model, small, operator=operator, target=target)
    assert all(getattr(large, key) == n for key, n in target.items())
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        before, after = (
            build(model, small).logits(tokens),
            build(large, new, growth.ramp).logits(tokens),
        )
    assert (after[..., : model.vocabulary] - before).abs().max() <= 1e-10


@pytest.mark.parametrize("operator", ["depth_stack", "depth_interleave", "depth_identity"])
@pytest.mark.parametrize("layers", [3, 5, 7])
def test_depth_reaches_any_number_of_layers(operator, layers):
    model = toy_model(layers=3)
    large, growth = plan_growth(GrowConfig(operator=operator, target={"layers": layers + 1}), model)
    sources = [
        growth.blocks(growth.target[f"layers.{i}.mlp.up.weight"])[0] for i in range(large.layers)
    ]
    numbers = [int(block.source.split(".")[1]) for block in sources]
    assert sorted(set(numbers)) == [0, 1, 2]
    assert sum(not block.new for block in sources) == 3
    if operator == "depth_stack":
        assert numbers == [i % 3 for i in range(layers + 1)]
    else:
        assert numbers == sorted(numbers)
        counts = [len(list(group)) for _, group in itertools.groupby(numbers)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "operator",
    ["width_noise", "width+depth_stack", "depth_stack+width_noise", "depth_stack+width_fresh"],
)
def test_noise_and_compositions_are_the_same_in_every_layout(operator):
    """Law 6, for cases that the registry's tests do not cover."""
    model = toy_model()
    small = build_catalog(model)
    state = random_state(small, seed=5, dtype=torch.float32)
    _, growth = plan_growth(GrowConfig(operator=operator), model)
    expected = mapped(growth, small, state, seed=7)
    rules = growth.rules_after(OptimizerRules(), step=1)
    before, after = Layout(data=2, tensor=2, zero=1), Layout(data=1, tensor=2, pipeline=2)
    a = Placement(small, before, group_keys(small, OptimizerRules()))
    b = Placement(growth.target, after, group_keys(growth.target, rules))

    def rank(channel: ThreadChannel):
        new = ShardState(b, channel.rank)
        transfer_between_ranks(
            state_map=growth, old=ShardState(a, channel.rank, whole_state=state), old_placement=a,
            new=new, new_placement=b, slots=ADAM_SLOTS, channel=channel, seed=7, staging_bytes=512,
        )  # fmt: skip
        return new.fault(expected)

    assert on_threads(rank, 4) == [None] * 4


def test_noise_follows_the_seed():
    model = toy_model()
    small = random_state(build_catalog(model), seed=1)
    _, growth = plan_growth(GrowConfig(operator="width_noise"), model)
    key = ("layers.0.mlp.up.weight", "master")
    one, other = (mapped(growth, build_catalog(model), small, seed=s).tensors[key] for s in (1, 2))
    assert not torch.equal(one, other)
    summed = one.view(24, 2, 8).sum(1)  # over the copies of the input
    torch.testing.assert_close(summed, other.view(24, 2, 8).sum(1), rtol=0, atol=1e-14)
    assert (one[::2] - one[1::2]).abs().max() > 1e-3  # a row's copy has its own noise


def test_a_ramp_counts_the_units_of_the_model_before_it():
    """In a width growth followed by new units, only the latter have a ramp."""
    model = toy_model()
    small = random_state(build_catalog(model), seed=1)
    middle, _, first = _grown(model, small, operator="width")
    large, growth, new = _grown(model, small, operator="width+width_random")
    assert growth.ramp.old == {"embed": 16, "kv_group": 4, "query": 1, "ffn": 24}
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        expected = build(middle, first).logits(tokens)
        assert (build(large, new, growth.ramp).logits(tokens) - expected).abs().max() <= 1e-10
