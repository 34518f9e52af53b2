"""Noise on copies: its scale, which tensors have it, and the same values in every layout."""

import itertools

import numpy as np
import pytest
import torch

from megagrow.config import GrowConfig
from megagrow.config.load import parse_settings
from megagrow.errors import ConfigError, GrowthError
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.execute import transfer_between_ranks
from tests.toys import (
    FAMILIES,
    ShardState,
    build,
    mapped,
    on_threads,
    random_state,
    token_batches,
    toy_model,
)

MODEL = toy_model(hidden=32, heads=4, ffn=48, init_std=0.02)
NOISY = ["width_noise", "width_perturb", "depth_stack", "depth_interleave", "depth_slices"]
UP = "layers.0.mlp.up.weight"


def _grown(model=MODEL, *, seed=0, scale=1.0, **section):
    state = random_state(build_catalog(model), seed=1)
    for (_, slot), values in state.tensors.items():
        if slot == "master":
            values.mul_(scale)
    large, growth = plan_growth(GrowConfig(**section), model)
    return state, large, growth, mapped(growth, build_catalog(model), state, seed=seed)


def _rms(values):
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize(("noise", "std"), [(None, 1.0), (0.2, 0.2), (3.0, 3.0)])
@pytest.mark.parametrize("operator", ["width_noise", "width_perturb"])
def test_it_is_as_large_as_asked_in_units_of_the_trained_tensor(operator, noise, std, scale):
    """Not in units of the initial std."""
    state, _, _, new = _grown(operator=operator, noise=noise, scale=scale)
    _, _, _, plain = _grown(operator="width", scale=scale)
    added = new.tensors[UP, "master"] - plain.tensors[UP, "master"]
    share = _rms(state.tensors[UP, "master"]) / 2
    assert _rms(added) == pytest.approx(std * share, rel=0.05)
    tiles = added.view(48, 2, 2, 32)  # unit, its copy, copy that is read, element
    if operator == "width_noise":
        assert tiles.sum(2).abs().max() < 1e-12
    else:
        blocks = [tiles[:, i, j].flatten().numpy() for i, j in itertools.product((0, 1), (0, 1))]
        assert np.abs(np.corrcoef(blocks) - np.eye(4)).max() < 0.1
    for name in ("embedding.token", "final_norm.weight", "layers.1.mlp.up.bias"):
        assert torch.equal(new.tensors[name, "master"], plain.tensors[name, "master"])


@pytest.mark.parametrize("operator", ["width_noise", "width_perturb"])
def test_without_noise_they_are_width(operator):
    _, _, _, new = _grown(operator=operator, noise=0)
    _, _, _, plain = _grown(operator="width")
    assert all(torch.equal(new.tensors[key], values) for key, values in plain.tensors.items())


def test_noise_that_does_not_cancel_changes_the_function_and_its_seed_changes_the_noise():
    tokens = torch.from_numpy(token_batches(MODEL, samples=4, seed=2)[0])[:, :-1]
    logits = {}
    for noise, seed in ((0, 0), (1, 0), (1, 1)):
        _, large, _, new = _grown(operator="width_perturb", noise=noise, seed=seed)
        with torch.no_grad():
            logits[noise, seed] = build(large, new).logits(tokens)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(logits.values(), 2))


@pytest.mark.parametrize("operator", NOISY[2:])
def test_copies_of_layers_take_noise_and_old_layers_none(operator):
    state, _, growth, new = _grown(operator=operator, noise=0.5)
    _, _, _, plain = _grown(operator=operator)
    noisy = set()
    for tensor in growth.target:
        key = tensor.name, "master"
        [block] = growth.blocks(tensor)
        added = new.tensors[key] - plain.tensors[key]
        if added.any():
            noisy.add(tensor.name)
            own = _rms(state.tensors[block.source, "master"])
            assert block.new and _rms(added) == pytest.approx(0.5 * own, rel=0.1)
        for slot in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new.tensors[tensor.name, slot], plain.tensors[tensor.name, slot])
    assert (
        noisy == {t.name for t in growth.target if t.is_matrix and growth.blocks(t)[0].new}
        and len(noisy) == 8
    )


def test_two_growths_add_other_numbers():
    """Layer 1 is a copy in both."""
    names = []
    model = MODEL
    for _ in range(2):
        large, growth = plan_growth(GrowConfig(operator="depth_interleave", noise=1), model)
        names += [b.noise.name for t in growth.target for b in growth.blocks(t) if b.noise]
        model = large
    assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize(
    "section",
    [
        {"operator": "width_perturb"},
        {"operator": "depth_stack", "noise": 0.3},
        {"operator": "depth_interleave", "noise": 0.3, "target": {"layers": 3}},
        {"operator": "depth_stack+width_perturb", "target": {"layers": 3, "hidden": 16}},
        {"operator": "sequence+depth_stack", "noise": 0.3, "target": {"layers": 3, "sequence": 7}},
    ],
    ids=lambda s: s["operator"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_has_the_same_noise(section, family):
    model = toy_model(family=family)
    small = build_catalog(model)
    state = random_state(small, seed=5, dtype=torch.float32)
    _, growth = plan_growth(GrowConfig(**section), model)
    expected = mapped(growth, small, state, seed=7)
    rules = growth.rules_after(OptimizerRules(), step=1)
    a = Placement(small, Layout(data=2, tensor=2, zero=1), group_keys(small, OptimizerRules()))
    after = Layout(data=4, zero=3)
    b = Placement(growth.target, after, group_keys(growth.target, rules))

    def rank(channel):
        new = ShardState(b, channel.rank)
        transfer_between_ranks(
            state_map=growth, old=ShardState(a, channel.rank, whole_state=state), old_placement=a,
            new=new, new_placement=b, slots=ADAM_SLOTS, channel=channel, seed=7, staging_bytes=512,
        )  # fmt: skip
        return new.fault(expected)

    assert on_threads(rank, 4) == [None] * 4


def test_operators_without_noise_refuse_it():
    takers = [operator.name for operator in OPERATORS.values() if "noise" in operator.settings]
    assert takers == NOISY
    for name in set(OPERATORS) - set(takers):
        with pytest.raises(GrowthError, match=r"grow\.noise: no operator takes it") as caught:
            plan_growth(GrowConfig(operator=name, noise=0.1), toy_model())
        assert all(taker in str(caught.value) for taker in takers)
    with pytest.raises(GrowthError, match="depth_stack and width_noise both take it"):
        plan_growth(GrowConfig(operator="depth_stack+width_noise", noise=0.1), toy_model())
    for bad in (-0.1, float("nan"), 1000):
        with pytest.raises(ConfigError, match="noise"):
            parse_settings(GrowConfig, {"operator": "width_noise", "noise": bad}, source="here")
