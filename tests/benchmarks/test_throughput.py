"""The contenders of the throughput benchmark train the same model."""

import pytest
import torch

from benchmarks.minimal_gpt import MinimalGPT
from benchmarks.throughput import RIVALS, measure_alone, measure_layouts, table
from megagrow.config import LayoutConfig
from megagrow.models.transformer import Transformer, named_tensors
from tests.ranks import run_ranks
from tests.toys import toy_model


def test_the_minimal_gpt_is_the_same_function():
    model = toy_model(ffn=32)
    torch.manual_seed(0)
    plain, ours = MinimalGPT(model).double(), Transformer(model).double()
    theirs = dict(plain.named_parameters())
    heads, width = model.heads, model.head_dim

    def fused(name, *rest):
        # [3, heads, head_dim, ...] there, [heads, 3, head_dim, ...] here
        return theirs[name].view(3, heads, width, *rest).transpose(0, 1)

    with torch.no_grad():
        for value in theirs.values():
            value.normal_(std=0.3)
        for name, value in named_tensors(ours).items():
            value.copy_(_counterpart(name, theirs, fused, model).reshape(value.shape))
    samples = torch.randint(model.vocabulary, (3, model.sequence + 1))
    torch.testing.assert_close(plain(samples), ours(samples))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())


def _counterpart(name, theirs, fused, model):
    if name == "embedding.token":
        return theirs["token.weight"]
    if name == "embedding.position":
        return theirs["position.weight"]
    kind = name.rpartition(".")[2]
    if name.startswith("final_norm"):
        return theirs[f"norm.{kind}"]
    _, layer, part, piece, kind = name.split(".")
    if piece == "qkv":
        rest = (model.hidden,) if kind == "weight" else ()
        return fused(f"layers.{layer}.qkv.{kind}", *rest)
    if piece == "norm":
        piece = "norm_1" if part == "attention" else "norm_2"
    return theirs[f"layers.{layer}.{piece}.{kind}"]


@pytest.mark.parametrize("name", list(RIVALS))
def test_every_rival_learns(name):
    if name.startswith("Hugging"):
        pytest.importorskip("transformers")
    model = toy_model(init_std=0.02, ffn=32)
    torch.manual_seed(0)
    rival = RIVALS[name](model)
    samples = torch.randint(model.vocabulary, (2, model.sequence + 1))
    optimizer = torch.optim.AdamW(rival.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = rival(samples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_turns_are_timed():
    model = toy_model()
    names = [name for name in RIVALS if not name.startswith("Hugging")]
    [result] = run_ranks(1, measure_alone, model, 2, 3, 1, names)
    assert result["tokens_a_step"] == 2 * model.sequence
    assert {len(times) for times in result["seconds"].values()} == {3}
    for speed in result["tokens_per_second"].values():
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
    text = table(result)
    assert all(name in text for name in (*names, "engine, layout.zero=0", "engine, layout.zero=1"))
    assert f"engine, documents of {model.sequence // 4} tokens apart" in text


def test_layouts_are_compared():
    layouts = [LayoutConfig(zero=2), LayoutConfig(tensor=2, zero=0), LayoutConfig(pipeline=2)]
    result, _ = run_ranks(2, measure_layouts, toy_model(), 8, 1, 1, layouts)
    assert list(result["seconds"]) == [
        "minimal GPT under DDP", "engine, data 2, ZeRO 2", "engine, tensor 2, ZeRO 0",
        "engine, pipeline 2, ZeRO 1",
    ]  # fmt: skip
    assert "pipeline 2" in table(result)
