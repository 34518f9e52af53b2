"""Masks: at 1 the plain model, between 0 and 1 what the paper's formulas say."""

import pytest
import torch

from megagrow.models.catalog import build_catalog
from megagrow.models.common.layers import AddRMSNorm
from megagrow.models.common.masks import ramp_in
from megagrow.models.transformer import named_tensors
from tests.toys import FAMILIES, build, grow, random_state, token_batches, toy_models

every_model = pytest.mark.parametrize("model", dict(toy_models()).values(), ids=dict(toy_models()))


def _grown(model):
    state = random_state(build_catalog(model), seed=1)
    large, growth, new = grow(model, state, operator="width_random")
    return large, growth.ramp, new


@every_model
def test_at_the_end_of_its_ramp_a_model_is_the_plain_one(model):
    large, ramp, state = _grown(model)
    tokens = torch.from_numpy(token_batches(large, samples=3, seed=1)[0])[:, :-1]
    with torch.no_grad():
        plain, masked = build(large, state), build(large, state, ramp, progress=1.0)
        half = build(large, state, ramp, progress=0.5)
        assert (plain.logits(tokens) - masked.logits(tokens)).abs().max() <= 1e-12
        assert (plain.logits(tokens) - half.logits(tokens)).abs().max() > 1e-3
    assert list(named_tensors(masked)) == list(named_tensors(plain))


@every_model
def test_new_units_have_a_gradient_as_soon_as_they_count(model):
    large, ramp, state = _grown(model)
    samples = torch.from_numpy(token_batches(large, samples=3, seed=1)[0])
    for progress, alive in ((0.0, False), (0.01, True)):
        module = build(large, state, ramp, progress=progress)
        module(samples).backward()
        gradient = named_tensors(module)["layers.0.mlp.up.weight"].grad
        new = gradient[..., ramp.old["ffn"] :, :]
        assert (new.abs().max() > 1e-9) == alive


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_norms_weigh_units_by_their_mask(family):
    model = dict(toy_models())[f"{family}-tied"]
    large, ramp, state = _grown(model)
    module = build(large, state)
    masks = ramp_in(module, large, ramp.old)
    masks.set(0.25)
    c = torch.where(torch.arange(16) < 8, 1.0, 0.25).double()
    assert torch.equal(masks.embed, c)
    norm = module.layers[1].mlp.norm
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = (c * x).sum(-1, keepdim=True) / c.sum() if family == "gpt2" else 0.0
    variance = (c * (x - mean) ** 2).sum(-1, keepdim=True) / c.sum()
    expected = (x - mean) / (variance + norm.eps).sqrt() * norm.weight
    expected = c * (expected + (norm.bias if family == "gpt2" else 0.0))
    for a, b in ((x, 0 * x), (0.3 * x, 0.7 * x)):  # this norm adds the residual first
        y, total = norm(a, b)
        torch.testing.assert_close(total, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # A rank of two has the units that its weights have.
    assert masks.ffn.tolist() == [1.0] * 12 + [0.25] * 12


def test_a_norm_of_another_kind_does_not_go_unmasked():
    model = dict(toy_models())["llama-tied"]
    large, ramp, state = _grown(model)
    module = build(large, state)
    module.layers[1].mlp.norm.__class__ = type("OtherNorm", (AddRMSNorm,), {})
    with pytest.raises(TypeError, match="no mask for OtherNorm"):
        ramp_in(module, large, ramp.old)
