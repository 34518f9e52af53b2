"""Whole models on tensor-parallel ranks against the unsharded ones, in fp64."""

import itertools

import pytest
import torch

from megagrow.config import ModelConfig
from megagrow.models.catalog import build_catalog
from megagrow.models.common.blocks import Attention
from megagrow.models.common.parallel import TensorParallel
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement, split_axis
from tests.models.parts import gradients, local_part, module_with, random_parameters, this_rank
from tests.ranks import run_ranks
from tests.toys import FAMILIES, featured_models

VOCABULARY = 13  # 2 ranks have 7 rows each, one of them padding
WORLD = 2


def make(family, **changes):
    sizes = {"layers": 2, "hidden": 16, "heads": 4, "ffn": 10, "sequence": 6, "vocab": VOCABULARY}
    return ModelConfig(family=family, **(sizes | changes))


VARIANTS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "grouped": {"kv_heads": 2},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full", "kv_heads": 2},
}
CASES = {
    f"{family}-{variant}": make(family, **changes)
    for family, (variant, changes) in itertools.product(FAMILIES, VARIANTS.items())
} | {
    # Queries, keys and norms of heads are on other ranks, and windows differ by layer.
    name: model
    for family, featured in featured_models(hidden=16, heads=4, ffn=10, head_dim=None).items()
    for name, model in (
        (f"{family}-featured", featured),
        (f"{family}-selective", featured.model_copy(
            update={"activation_checkpointing": "selective"})),
    )
}  # fmt: skip


def samples():
    return torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(8))


def loss_and_gradients(module):
    loss = module(samples())
    loss.backward()
    return loss.detach(), gradients(module)


def _all_cases(comm):
    results = {}
    for (name, model), sequence in itertools.product(CASES.items(), (False, True)):
        module = module_with(model, random_parameters(model), this_rank(comm, sequence=sequence))
        with torch.no_grad():
            logits = module.logits(samples()[:, :-1])
        results[name, sequence] = (logits, *loss_and_gradients(module))
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(WORLD, _all_cases)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_the_whole_model(results, name, sequence):
    model = CASES[name]
    whole = module_with(model, random_parameters(model))
    logits = whole.logits(samples()[:, :-1])
    loss, wanted = loss_and_gradients(whole)
    for rank in range(WORLD):
        mine_logits, mine_loss, mine = results[rank][name, sequence]
        torch.testing.assert_close(mine_logits, logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(mine_loss, loss, rtol=0, atol=1e-12)
        assert mine.keys() == wanted.keys()
        for tensor, gradient in wanted.items():
            part = local_part(model, tensor, gradient, TensorParallel(None, rank, WORLD))
            # The gradient of padding, whose values are NaN, is zero.
            torch.testing.assert_close(mine[tensor], part.nan_to_num(0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", ["gpt2-tied", "gpt2-untied", "llama-tied", "llama-untied"])
def test_parameters_have_the_shapes_of_the_placement(name, tensor):
    model = CASES[name].model_copy(update={"ffn": 12})
    placement = Placement(build_catalog(model), Layout(tensor=tensor))
    for rank in range(tensor):
        found = named_tensors(Transformer(model, TensorParallel(None, rank, tensor)))
        assert {name: tuple(p.shape) for name, p in found.items()} == {
            t.name: placement.local(t, rank).shape for t in placement.catalog
        }


def _dropout(comm):
    """Loss and gradients under dropout, without recomputation and with it."""
    results = {}
    for sequence, recompute in itertools.product((False, True), ("none", "selective", "full")):
        model = make("gpt2", layers=1, dropout=0.4, activation_checkpointing=recompute)
        module = module_with(model, random_parameters(model), this_rank(comm, sequence=sequence))
        torch.manual_seed(9)
        results[sequence, recompute] = loss_and_gradients(module.train())
    return results


def test_dropout_keeps_the_ranks_in_step():
    catalog = build_catalog(make("gpt2", layers=1))
    replicated = [tensor.name for tensor in catalog if split_axis(tensor) is None]
    assert "embedding.position" in replicated and len(replicated) == 9
    first, second = run_ranks(WORLD, _dropout)
    for sequence in (False, True):
        loss, mine = first[sequence, "none"]
        other_loss, theirs = second[sequence, "none"]
        assert loss == other_loss
        for name in replicated:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-12)
        for recompute in ("selective", "full"):
            again, recomputed = first[sequence, recompute]
            assert again == loss
            assert all(torch.equal(recomputed[name], mine[name]) for name in mine)


def core(rank, *, dropout):
    """Attention of the same queries, keys and values on a rank, and a number drawn after it."""
    attention = Attention(make("gpt2", dropout=dropout), TensorParallel(None, rank, WORLD))
    qkv = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(9)
    heads = (attention.groups, attention.queries + 2, attention.head_dim)
    q, k, v = qkv.view(3, 6, *heads).split((attention.queries, 1, 1), dim=3)
    return attention._core(q, k, v, None), torch.rand(())


def test_attention_drops_other_probabilities_on_every_rank():
    (first, after), (second, other_after) = core(0, dropout=0.4), core(1, dropout=0.4)
    assert not torch.equal(first, second)
    assert torch.equal(after, other_after)
    assert torch.equal(core(0, dropout=0.0)[0], core(1, dropout=0.0)[0])
