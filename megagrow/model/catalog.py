"""The logical tensors of a model configuration, in the order of its layer list."""

from __future__ import annotations

from megagrow.config import ModelConfig
from megagrow.state.catalog import Catalog, Init, LogicalTensor

ZEROS, ONES = Init("zeros"), Init("ones")


def build_catalog(model: ModelConfig) -> Catalog:
    """All tensors of a model, with shapes, axes and initialisation.

    Matrices start at N(0, init_std); the two that write to the residual stream are scaled by
    1/sqrt(2 * layers) (Radford et al., GPT-2, section 2.3).  Weight decay acts on matrices and
    embeddings, not on norms and biases.

    Raises:
        ValueError: the vocabulary size is not known yet.
    """
    tensors: list[LogicalTensor] = []
    weight = Init("normal", model.init_std)
    to_stream = Init("normal", model.init_std / (2 * model.layers) ** 0.5)
    hidden, ffn, groups, head_dim = model.hidden, model.ffn, model.kv_groups, model.head_dim
    queries = model.heads // groups
    last = model.layers + 1

    def add(
        name: str, axes: dict[str, int], init: Init, *places: int, decay: bool = False
    ) -> None:
        tensors.append(
            LogicalTensor(name, tuple(axes.values()), tuple(axes), init, decay, tuple(places))
        )

    def add_norm(name: str, place: int) -> None:
        add(f"{name}.weight", {"embed": hidden}, ONES, place)
        add(f"{name}.bias", {"embed": hidden}, ZEROS, place)

    token_places = (0, last) if model.tie_embeddings else (0,)
    token_axes = {"vocab": model.vocabulary, "embed": hidden}
    add("embedding.token", token_axes, weight, *token_places, decay=True)
    position_axes = {"position": model.sequence, "embed": hidden}
    add("embedding.position", position_axes, weight, 0, decay=True)
    for i in range(model.layers):
        block, place = f"layers.{i}", i + 1
        qkv = {"kv_group": groups, "projection": queries + 2, "head_dim": head_dim}
        heads = {"kv_group": groups, "query": queries, "head_dim": head_dim}
        add_norm(f"{block}.attention.norm", place)
        add(f"{block}.attention.qkv.weight", {**qkv, "embed": hidden}, weight, place, decay=True)
        add(f"{block}.attention.qkv.bias", qkv, ZEROS, place)
        add(f"{block}.attention.out.weight", {"embed": hidden, **heads}, to_stream, place,
            decay=True)  # fmt: skip
        add(f"{block}.attention.out.bias", {"embed": hidden}, ZEROS, place)
        add_norm(f"{block}.mlp.norm", place)
        add(f"{block}.mlp.up.weight", {"ffn": ffn, "embed": hidden}, weight, place, decay=True)
        add(f"{block}.mlp.up.bias", {"ffn": ffn}, ZEROS, place)
        add(f"{block}.mlp.down.weight", {"embed": hidden, "ffn": ffn}, to_stream, place,
            decay=True)  # fmt: skip
        add(f"{block}.mlp.down.bias", {"embed": hidden}, ZEROS, place)
    add_norm("final_norm", last)
    if not model.tie_embeddings:
        add("output.weight", token_axes, weight, last, decay=True)
    return Catalog(tuple(tensors))
