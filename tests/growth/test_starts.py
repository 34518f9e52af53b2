"""Depth by a list of layers, an untied head, shrunk and perturbed weights: by their formulas."""

import numpy as np
import pytest
import torch

from megagrow.config import GrowConfig
from megagrow.config.load import parse_settings
from megagrow.errors import ConfigError, GrowthError
from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.growth.plan import plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.growth.settings import growth_in_words
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.fresh import fresh
from megagrow.state.roles import WRITERS
from tests.growth.models import MODELS
from tests.toys import FAMILIES, build, mapped, random_state, token_batches, toy_model

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def _grown(model, **section):
    state = random_state(build_catalog(model), seed=1)
    large, growth = plan_growth(GrowConfig(**section), model)
    return state, large, growth, mapped(growth, build_catalog(model), state)


def _order(growth):
    """(source, whether new) of every layer."""
    layers = 1 + max(int(t.name.split(".")[1]) for t in growth.target if "layers." in t.name)
    found = []
    for layer in range(layers):
        tensors = [t for t in growth.target if t.name.startswith(f"layers.{layer}.")]
        sources = {(int(b.source.split(".")[1]), b.new) for t in tensors for b in growth.blocks(t)}
        assert len(sources) == 1
        found.append(sources.pop())
    return found


# --- depth_slices -------------------------------------------------------------------------


def test_slices_of_a_list():
    """A small version of SOLAR's overlap: 0 to 2, then 1 to 3."""
    section = {"operator": "depth_slices", "sources": [0, 1, 2, 1, 2, 3]}
    model = toy_model(layers=4)
    state, large, growth, new = _grown(model, **section)
    assert large.layers == 6
    assert _order(growth) == [(0, False), (1, False), (2, False), (1, True), (2, True), (3, False)]
    for layer, source in enumerate(section["sources"]):
        for slot in ADAM_SLOTS:  # `copy`: moments too
            for rest in ("mlp.up.weight", "attention.norm.bias"):
                assert torch.equal(
                    new.tensors[f"layers.{layer}.{rest}", slot.name],
                    state.tensors[f"layers.{source}.{rest}", slot.name],
                )
    by_hand = build(large, new)
    with torch.no_grad():
        named = named_tensors(by_hand)
        for name in named:
            if name.startswith("layers."):
                _, layer, rest = name.split(".", 2)
                from_ = f"layers.{section['sources'][int(layer)]}.{rest}"
                named[name].copy_(state.tensors[from_, "master"])
        tokens = torch.from_numpy(token_batches(model, samples=2, seed=2)[0])[:, :-1]
        assert torch.equal(by_hand.logits(tokens), build(large, new).logits(tokens))
    assert growth_in_words(GrowConfig(**section)) == "depth_slices of layers 0 1 2 1 2 3"


def test_identity_blocks_of_a_list():
    """LLaMA Pro's: a copy after the last layer of each group, its output projections zero."""
    section = {"operator": "depth_identity", "sources": [0, 1, 1, 2, 3, 3]}
    for model in (toy_model(layers=4), toy_model(layers=4, family="llama")):
        state, large, growth, new = _grown(model, **section)
        assert large.layers == 6 and growth.policy.name == "kept"
        kept, copies = [0, 1, 3, 4], {2: 1, 5: 3}
        assert [layer for layer, (_, new_) in enumerate(_order(growth)) if not new_] == kept
        tokens = torch.from_numpy(token_batches(model, samples=2, seed=2)[0])[:, :-1]
        with torch.no_grad():
            before, after = (build(m, s).logits(tokens) for m, s in ((model, state), (large, new)))
        assert torch.allclose(before, after, rtol=0, atol=1e-10)
        for tensor in growth.target:
            if tensor.layer not in copies:
                continue
            found = new.tensors[tensor.name, "master"]
            if tensor.role in WRITERS:
                assert not found.any()
            else:
                source = f"layers.{copies[tensor.layer]}.{tensor.inner}"
                assert torch.equal(found, state.tensors[source, "master"])
            assert not new.tensors[tensor.name, "exp_avg"].any()


def test_identity_blocks_keep_the_order_of_the_layers():
    with pytest.raises(GrowthError, match="changes the order of the layers"):
        _grown(toy_model(layers=3), operator="depth_identity", sources=[0, 2, 1, 2])
    with pytest.raises(GrowthError, match="leaves out layer 1"):
        _grown(toy_model(layers=3), operator="depth_identity", sources=[0, 0, 2])


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"keep_first": 1, "keep_last": 1}, [0, 1, 2, 1, 2, 1, 2, 3]),
        ({"keep_first": 1}, [0, 1, 2, 3, 1, 2, 3, 1]),
        ({"keep_last": 3}, [0, 0, 0, 0, 0, 1, 2, 3]),
        ({"keep_first": 1, "keep_last": 1, "target": {"layers": 5}}, [0, 1, 2, 1, 3]),
        ({}, [0, 1, 2, 3, 0, 1, 2, 3]),
    ],
)
def test_layers_at_the_ends_stay_single(settings, order):
    _, growth = plan_growth(GrowConfig(operator="depth_slices", **settings), toy_model(layers=4))
    found = _order(growth)
    assert [source for source, _ in found] == order
    assert [new for _, new in found] == [order.index(s) < i for i, s in enumerate(order)]


def test_slices_go_with_width():
    section = {"operator": "width_fresh+depth_slices", "sources": [0, 1, 0]}
    with pytest.raises(GrowthError, match="name width_fresh last"):
        plan_growth(GrowConfig(**section), toy_model())
    section["operator"] = "depth_slices+width_fresh"
    large, _ = plan_growth(GrowConfig(**section, target={"hidden": 9}), toy_model())
    assert (large.layers, large.hidden) == (3, 9)
    large, _ = plan_growth(GrowConfig(**section, factor=3), toy_model())
    assert (large.layers, large.hidden) == (3, 24)
    assert (
        growth_in_words(GrowConfig(**section, factor=3))
        == "depth_slices+width_fresh of layers 0 1 0 x3"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sources": [0, 1, 2]}, "there is no layer 2"),
        ({"sources": [0, 0, 0]}, "leaves out layer 1"),
        ({"sources": [0, 1, 0], "keep_first": 1}, "keep_first and keep_last have no meaning"),
        ({"sources": [0, 1, 0], "target": {"layers": 4}}, "not the length of grow.sources"),
        ({"keep_first": 1, "keep_last": 1}, "leave no layer to copy"),
        ({"operator": "depth_stack", "sources": [0, 1, 0]}, "no operator takes it"),
        ({"operator": "width", "keep_first": 1}, "no operator takes it"),
        ({"operator": "depth_slices+depth_slices", "keep_first": 0}, "both take it"),
    ],
)
def test_slices_that_cannot_be_are_refused(settings, said):
    with pytest.raises(GrowthError) as caught:
        plan_growth(GrowConfig(**({"operator": "depth_slices"} | settings)), toy_model())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"sources": []}, {"sources": [-1]}, {"keep_first": -1}, {"sources": "01"}]
)
def test_settings_that_are_none_are_refused_in_the_configuration(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        parse_settings(GrowConfig, {"operator": "depth_slices", **settings}, source="here")


def test_a_list_survives_the_file_it_is_written_to():
    section = GrowConfig(operator="depth_slices", sources=[0, 1, 0])
    written = section.model_dump(mode="json")
    assert written["sources"] == [0, 1, 0]
    assert parse_settings(GrowConfig, written, source="here") == section


# --- untie --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_becomes_a_copy_with_its_moments(family):
    model = toy_model(family=family)
    state, large, growth, new = _grown(model, operator="untie")
    assert not large.tie_embeddings and large == model.model_copy(update={"tie_embeddings": False})
    for slot in ADAM_SLOTS:
        before = state.tensors["embedding.token", slot.name]
        for name in ("embedding.token", "output.weight"):
            assert torch.equal(new.tensors[name, slot.name], before)
    for key, values in state.tensors.items():
        assert torch.equal(new.tensors[key], values)
    assert not growth.rules_after(OptimizerRules(), step=5).young
    assert growth_in_words(GrowConfig(operator="untie")) == "untie"


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_share_out_the_tied_gradient_and_part(family):
    model = toy_model(family=family)
    state, large, _, new = _grown(model, operator="untie")
    samples = torch.from_numpy(token_batches(model, samples=4, seed=3)[0])
    one, other = build(model, state), build(large, new)
    for module in (one, other):
        module(samples).backward()
    tied = named_tensors(one)["embedding.token"].grad
    parts = [named_tensors(other)[name].grad for name in ("embedding.token", "output.weight")]
    torch.testing.assert_close(parts[0] + parts[1], tied, rtol=0, atol=1e-12)
    assert (parts[0] - parts[1]).abs().max() > 1e-4


def test_a_head_that_is_not_tied_cannot_be_untied():
    model = toy_model(tie_embeddings=False)
    with pytest.raises(GrowthError, match="untie changes nothing here"):
        plan_growth(GrowConfig(operator="untie"), model)
    with pytest.raises(GrowthError, match="no operator grows it"):
        plan_growth(GrowConfig(operator="untie", target={"hidden": 16}), toy_model())
    large, _ = plan_growth(GrowConfig(operator="width+untie", target={"ffn": 24}), toy_model())
    assert (large.ffn, large.tie_embeddings) == (24, False)


# --- shrink_pad_perturb -------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("shrink", [None, 0.7, 1.0])
def test_old_weights_are_shrunk_and_all_of_a_matrix_is_perturbed(model, shrink):
    state, _, growth, new = _grown(model, operator="shrink_pad_perturb", shrink=shrink)
    factor = 0.4 if shrink is None else shrink
    for tensor in growth.target:
        [block] = growth.blocks(tensor)
        axes = [slice(a.target_start, a.target_start + a.length) for a in block.axes]
        old = state.tensors[tensor.name, "master"]
        found = new.tensors[tensor.name, "master"]
        inside = found[tuple(axes)]
        rest = np.ones(tensor.shape, dtype=bool)
        rest[tuple(axes)] = False
        start = fresh(tensor, whole(tensor.shape), seed=0)
        assert np.array_equal(found.numpy()[rest], start[rest])
        if tensor.is_matrix:
            added = inside - factor * old
            assert added.std() == pytest.approx(tensor.init.std, rel=0.3)
            assert not np.allclose(added.numpy(), start[tuple(axes)], atol=0.1 * tensor.init.std)
        else:
            kept = old if "norm" in tensor.name else factor * old
            torch.testing.assert_close(inside, kept, rtol=1e-15, atol=0)
        for slot in ("exp_avg", "exp_avg_sq"):
            assert not new.tensors[tensor.name, slot].any()


def test_shrink_is_refused_elsewhere_and_out_of_range():
    for name in set(OPERATORS) - {"shrink_pad_perturb"}:
        with pytest.raises(GrowthError, match=r"grow\.shrink: no operator takes it"):
            plan_growth(GrowConfig(operator=name, shrink=0.5), toy_model())
    for bad in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="shrink"):
            parse_settings(
                GrowConfig, {"operator": "shrink_pad_perturb", "shrink": bad}, source="here"
            )
