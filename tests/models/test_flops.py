import itertools
from fnmatch import fnmatch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagrow.config import ModelConfig
from megagrow.growth.training import trained_catalog
from megagrow.models.catalog import build_catalog
from megagrow.models.common.blocks import layer_types
from megagrow.models.flops import forward_flops_per_token, train_flops_per_token
from megagrow.models.registry import FAMILIES as REGISTERED
from megagrow.models.transformer import named_tensors
from tests.models.parts import module_with, random_parameters
from tests.toys import FAMILIES

SHAPES = [
    {},
    {"kv_heads": 2},
    {"head_dim": 10},
    {"tie_embeddings": False},
]
MODELS = [
    ModelConfig(
        family=family, layers=3, hidden=24, heads=4, ffn=20, sequence=8, vocab=13, **changes
    )
    for family, changes in itertools.product(FAMILIES, SHAPES)
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_flops_are_those_of_the_products_that_run(model):
    module = module_with(model, random_parameters(model))
    samples = torch.randint(13, (2, model.sequence + 1))
    tokens = samples[:, 1:].numel()
    # The plain kernel, whose backward pass recomputes nothing.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = module(samples)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert forward.get_total_flops() == tokens * forward_flops_per_token(model)
    # The input of the first projection is not a parameter, but its gradient is computed.
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == tokens * train_flops_per_token(model)


TRAINED = [
    ["layers.1.*"],
    ["layers.2.mlp.down.weight", "layers.1.mlp.up.weight"],
    ["layers.1.attention.out.weight"],
    ["layers.1.attention.qkv.weight", "layers.2.mlp.norm.weight"],
    ["layers.2.mlp.*norm.weight"],
    ["layers.2.attention.norm.weight"],
    ["layers.2.attention.post_norm.weight"],
    ["final_norm.weight"],
    ["embedding.token"],
    ["output.weight"],
    ["writer"],
]


# Of the common layers: the toy family of other tests has a parallel block of its own.
PLAIN = [name for name, family in REGISTERED.items() if family.layers is layer_types]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("trained", TRAINED, ids=str)
def test_the_backward_pass_of_frozen_tensors_costs_less(name, trained):
    """What autograd computes, product by product, for a family of every kind."""
    model = ModelConfig(
        family=name, layers=3, hidden=24, heads=4, ffn=20, sequence=8, vocab=13,
        tie_embeddings=trained == ["embedding.token"],
    )  # fmt: skip
    every = build_catalog(model)
    found = [one for one in trained if any(fnmatch(t.name, one) or t.role == one for t in every)]
    if not found:
        pytest.skip("no such tensor in this family")
    catalog = trained_catalog(found, every, growth=None, index=0)
    module = module_with(model, random_parameters(model))
    for tensor, parameter in named_tensors(module).items():
        parameter.requires_grad_(catalog[tensor].training == "trained")
    samples = torch.randint(13, (2, model.sequence + 1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        module(samples).backward()
    assert counted.get_total_flops() == samples[:, 1:].numel() * train_flops_per_token(
        model, catalog
    )
    for tensor, parameter in named_tensors(module).items():
        assert (parameter.grad is None) == (catalog[tensor].training == "frozen")


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_parameters_are_counted_once(model):
    module = module_with(model, random_parameters(model))
    assert build_catalog(model).parameters == sum(p.numel() for p in module.parameters())


def test_counts_of_published_models():
    gpt2 = ModelConfig(layers=12, hidden=768, heads=12, ffn=3072, sequence=1024, vocab=50257)
    assert build_catalog(gpt2).parameters == 124_439_808
    llama2_7b = ModelConfig(
        family="llama", layers=32, hidden=4096, heads=32, ffn=11008, sequence=4096, vocab=32000,
        tie_embeddings=False,
    )  # fmt: skip
    assert build_catalog(llama2_7b).parameters == 6_738_415_616
    llama3_8b = llama2_7b.model_copy(update={"kv_heads": 8, "ffn": 14336, "vocab": 128256})
    assert build_catalog(llama3_8b).parameters == 8_030_261_248
