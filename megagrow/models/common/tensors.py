"""The logical tensors of transformers, in the order of the layer list."""

from __future__ import annotations

import math
from collections.abc import Iterable

from megagrow.config import ModelConfig
from megagrow.models.common.mup import scale_of
from megagrow.state.catalog import Catalog, Init, LogicalTensor, Rates
from megagrow.state.roles import GAINS, HEAD_GAINS, MATRICES, NORMS, Role

ZEROS, ONES = Init("zeros"), Init("ones")
DECAYED: frozenset[Role] = MATRICES | {"embedding", "position", "head"}


def catalog(model: ModelConfig) -> Catalog:
    """All tensors of a model, with shapes, axes and initialisation.

    Matrices and embeddings are initialised with N(0, std) by role (`ModelConfig.stds`); the two
    matrices of a block that write to the residual stream are scaled by 1/sqrt(2 * layers) (Radford
    et al., GPT-2, section 2.3).  Weight decay applies to matrices and embeddings, not to norms and
    biases. With `model.mup` both the initialisation and the rates of a tensor depend on the shape.

    Raises:
        ValueError: the vocabulary size is unset.
    """
    tensors: list[LogicalTensor] = []
    made = model.architecture
    stds, scale = model.stds, scale_of(model)
    groups, queries = model.kv_groups, model.heads // model.kv_groups
    embed = {"embed": model.hidden}
    ffn = {"ffn": model.ffn}
    up = {"gate_up": 2, **ffn} if made.gated else ffn
    qkv = {"kv_group": groups, "projection": queries + 2, "head_dim": model.head_dim}
    heads = {"kv_group": groups, "query": queries, "head_dim": model.head_dim}
    last, centred = model.layers + 1, made.norm == "layer"
    kinds = _kinds(model)
    unit = ZEROS if made.unit_gain else ONES
    before, after = made.block_norms != "after", made.block_norms != "before"

    def add(
        name: str,
        axes: dict[str, int],
        role: Role,
        init: Init,
        rates: Rates,
        *places: int,
        reads: Iterable[str] = (),
    ) -> None:
        tensors.append(
            LogicalTensor(
                name,
                shape=tuple(axes.values()),
                axes=tuple(axes),
                init=init,
                decay=role in DECAYED,
                places=places,
                role=role,
                reads=tuple(reads),
                centred=centred and role in NORMS - HEAD_GAINS,
                scaled=made.scaled_embedding and role == "embedding",
                offset=1.0 if made.unit_gain and role in GAINS else 0.0,
                kind=kinds.get(places[0], ""),
                rates=rates,
            )
        )

    def add_norm(
        name: str, gain: Init, rates: Rates, place: int, *, roles: tuple[Role, Role]
    ) -> None:
        add(f"{name}.weight", embed, roles[0], gain, rates, place)
        if centred:
            add(f"{name}.bias", embed, roles[1], ZEROS, rates, place)

    def add_reader(name: str, out: dict[str, int], inner: float, place: int) -> None:
        """A matrix that reads the residual stream; `inner`: the muP ratio of its outputs."""
        std = _std(stds.matrices, embed, scale.hidden)
        rates = scale.reader(inner)
        axes, init = {**out, **embed}, Init("normal", std)
        add(f"{name}.weight", axes, "reader", init, rates, place, reads=embed)
        if made.biases == "all" or (made.biases == "qkv" and "projection" in out):
            add(f"{name}.bias", out, "reader_bias", ZEROS, scale.reader_bias(inner), place)

    def add_writer(name: str, inputs: dict[str, int], inner: float, place: int) -> None:
        """A matrix that writes to the residual stream; `inner`: the muP ratio of its inputs."""
        std = _std(stds.matrices, inputs, inner) / (2 * model.layers / scale.layers) ** 0.5
        axes, init = {**embed, **inputs}, Init("normal", std / scale.layers)
        add(f"{name}.weight", axes, "writer", init, scale.writer(inner), place, reads=inputs)
        if made.biases == "all":
            add(f"{name}.bias", embed, "writer_bias", ZEROS, scale.writer_bias, place)

    token_places = (0, last) if model.tie_embeddings else (0,)
    token_axes = {"vocab": model.vocabulary, **embed}
    token = Init("normal", stds.embedding)
    add("embedding.token", token_axes, "embedding", token, scale.table, *token_places)
    if made.positions == "learned":
        axes = {"position": model.sequence, **embed}
        position = Init("normal", stds.position)
        add("embedding.position", axes, "position", position, scale.table, 0)
    of_block: tuple[Role, Role] = ("norm_gain", "norm_bias")
    behind: tuple[Role, Role] = ("post_norm_gain", "other")  # no family has a bias there
    for i in range(model.layers):
        block, place = f"layers.{i}", i + 1
        if before:
            add_norm(f"{block}.attention.norm", unit, scale.norm, place, roles=of_block)
        add_reader(f"{block}.attention.qkv", qkv, scale.heads, place)
        if made.head_norm is not None:
            each = made.head_norm == "each"
            queried = {"head_dim": model.head_dim} if each else heads
            keyed = queried if each else {"kv_group": groups, "head_dim": model.head_dim}
            names = (f"{block}.attention.query_norm.weight", f"{block}.attention.key_norm.weight")
            add(names[0], queried, "query_gain", ONES, scale.norm, place)
            add(names[1], keyed, "key_gain", ONES, scale.norm, place)
        add_writer(f"{block}.attention.out", heads, scale.heads, place)
        if after:
            add_norm(f"{block}.attention.post_norm", unit, scale.norm, place, roles=behind)
        if before:
            add_norm(f"{block}.mlp.norm", unit, scale.norm, place, roles=of_block)
        add_reader(f"{block}.mlp.up", up, scale.ffn, place)
        add_writer(f"{block}.mlp.down", ffn, scale.ffn, place)
        if after:
            add_norm(f"{block}.mlp.post_norm", unit, scale.norm, place, roles=behind)
    gain = unit if scale.hidden == 1.0 else Init("constant", 1.0 / scale.hidden)
    roles: tuple[Role, Role] = ("final_norm_gain", "final_norm_bias")
    add_norm("final_norm", gain, scale.final_norm, last, roles=roles)
    if not model.tie_embeddings:
        head = Init("normal", stds.head)
        add("output.weight", token_axes, "head", head, scale.table, last, reads=embed)
    return Catalog(tuple(tensors))


def _std(given: float | None, inputs: dict[str, int], scale: float) -> float:
    """The std of a matrix: as configured for the base shape, or from its fan-in."""
    return 1 / math.prod(inputs.values()) ** 0.5 if given is None else given / scale**0.5


def _kinds(model: ModelConfig) -> dict[int, str]:
    """How each block differs from the others, by its place; empty if all are alike."""
    if model.full_every is None and model.no_rope_every is None:
        return {}
    kinds = {layer + 1: model.layer_kind(layer) for layer in range(model.layers)}
    return {
        place: (f"window {kind.window}" if kind.window else "all tokens")
        + ("" if kind.rotary else ", no positions")
        for place, kind in kinds.items()
    }
