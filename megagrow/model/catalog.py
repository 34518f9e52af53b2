"""The logical tensors of a model configuration, in the order of its layer list."""

from __future__ import annotations

import math

from megagrow.config import ModelConfig
from megagrow.state.catalog import Catalog, Init, LogicalTensor

ZEROS, ONES = Init("zeros"), Init("ones")


def build_catalog(model: ModelConfig) -> Catalog:
    """All tensors of a model, with shapes, axes and initialisation.

    Matrices and embeddings start at N(0, std) by their role (`ModelConfig.stds`); the two matrices
    of a block that write to the residual stream are scaled by 1/sqrt(2 * layers) (Radford et al.,
    GPT-2, section 2.3).  Weight decay acts on matrices and embeddings, not on norms and biases.

    Raises:
        ValueError: the vocabulary size is not known yet.
    """
    tensors: list[LogicalTensor] = []
    stds = model.stds
    groups, queries = model.kv_groups, model.heads // model.kv_groups
    embed = {"embed": model.hidden}
    ffn = {"ffn": model.ffn}
    up = ffn if model.family == "gpt2" else {"gate_up": 2, **ffn}
    qkv = {"kv_group": groups, "projection": queries + 2, "head_dim": model.head_dim}
    heads = {"kv_group": groups, "query": queries, "head_dim": model.head_dim}
    last = model.layers + 1

    def add(name: str, axes: dict[str, int], init: Init, *places: int, decay: bool = False) -> None:
        tensors.append(
            LogicalTensor(name, tuple(axes.values()), tuple(axes), init, decay, tuple(places))
        )

    def add_norm(name: str, place: int) -> None:
        add(f"{name}.weight", embed, ONES, place)
        if model.biases:
            add(f"{name}.bias", embed, ZEROS, place)

    def add_linear(name: str, out: dict[str, int], inputs: dict[str, int], place: int) -> None:
        std = stds.matrices or 1 / math.prod(inputs.values()) ** 0.5
        if out == embed:  # it writes to the residual stream
            std /= (2 * model.layers) ** 0.5
        add(f"{name}.weight", {**out, **inputs}, Init("normal", std), place, decay=True)
        if model.biases:
            add(f"{name}.bias", out, ZEROS, place)

    token_places = (0, last) if model.tie_embeddings else (0,)
    token_axes = {"vocab": model.vocabulary, **embed}
    token = Init("normal", stds.embedding)
    add("embedding.token", token_axes, token, *token_places, decay=True)
    if model.family == "gpt2":
        position = Init("normal", stds.position)
        add("embedding.position", {"position": model.sequence, **embed}, position, 0, decay=True)
    for i in range(model.layers):
        block, place = f"layers.{i}", i + 1
        add_norm(f"{block}.attention.norm", place)
        add_linear(f"{block}.attention.qkv", qkv, embed, place)
        add_linear(f"{block}.attention.out", embed, heads, place)
        add_norm(f"{block}.mlp.norm", place)
        add_linear(f"{block}.mlp.up", up, embed, place)
        add_linear(f"{block}.mlp.down", embed, ffn, place)
    add_norm("final_norm", last)
    if not model.tie_embeddings:
        add("output.weight", token_axes, Init("normal", stds.head), last, decay=True)
    return Catalog(tuple(tensors))
