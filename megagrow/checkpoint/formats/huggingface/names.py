"""Which stored array of Hugging Face is which box of our tensors, in which order of axes.

GPT-2 stores weights of linear layers as [inputs, outputs] and query, key and value as three
blocks of outputs; ours are [kv_group, query + 2, head_dim, embed].  LLaMA has them apart, and
both sides pair rotary features half against half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.state.boxes import Box, whole
from megagrow.state.catalog import Catalog


@dataclass(frozen=True)
class Row:
    """One line of a table: a stored array and what it is of a logical tensor.

    Attributes:
        stored, tensor: names; `{i}` is the layer.
        axes: order of the logical axes in the array, or None for their own.
        rows: how many of those make the array's first axis, the others its second; 0 for a vector.
        cut: the part of the logical tensor, by its name in `_cut`.
    """

    stored: str
    tensor: str
    axes: tuple[int, ...] | None = None
    rows: int = 1
    cut: str = ""


_GPT2 = (
    Row("transformer.wte.weight", "embedding.token"),
    Row("transformer.wpe.weight", "embedding.position"),
    Row("transformer.ln_f.weight", "final_norm.weight", rows=0),
    Row("transformer.ln_f.bias", "final_norm.bias", rows=0),
    Row("lm_head.weight", "output.weight"),
)
_GPT2_BLOCK = (
    Row("transformer.h.{i}.ln_1.weight", "layers.{i}.attention.norm.weight", rows=0),
    Row("transformer.h.{i}.ln_1.bias", "layers.{i}.attention.norm.bias", rows=0),
    Row("transformer.h.{i}.attn.c_attn.weight", "layers.{i}.attention.qkv.weight", (3, 1, 0, 2)),
    Row("transformer.h.{i}.attn.c_attn.bias", "layers.{i}.attention.qkv.bias", (1, 0, 2), rows=0),
    Row("transformer.h.{i}.attn.c_proj.weight", "layers.{i}.attention.out.weight", (1, 2, 3, 0), 3),
    Row("transformer.h.{i}.attn.c_proj.bias", "layers.{i}.attention.out.bias", rows=0),
    Row("transformer.h.{i}.ln_2.weight", "layers.{i}.mlp.norm.weight", rows=0),
    Row("transformer.h.{i}.ln_2.bias", "layers.{i}.mlp.norm.bias", rows=0),
    Row("transformer.h.{i}.mlp.c_fc.weight", "layers.{i}.mlp.up.weight", (1, 0)),
    Row("transformer.h.{i}.mlp.c_fc.bias", "layers.{i}.mlp.up.bias", rows=0),
    Row("transformer.h.{i}.mlp.c_proj.weight", "layers.{i}.mlp.down.weight", (1, 0)),
    Row("transformer.h.{i}.mlp.c_proj.bias", "layers.{i}.mlp.down.bias", rows=0),
)
_LLAMA = (
    Row("model.embed_tokens.weight", "embedding.token"),
    Row("model.norm.weight", "final_norm.weight", rows=0),
    Row("lm_head.weight", "output.weight"),
)
_LLAMA_BLOCK = (
    Row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention.norm.weight", rows=0),
    *(
        Row(
            f"model.layers.{{i}}.self_attn.{cut}_proj.weight",
            "layers.{i}.attention.qkv.weight",
            rows=3,
            cut=cut,
        )
        for cut in "qkv"
    ),
    Row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.out.weight"),
    Row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp.norm.weight", rows=0),
    Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up.weight", rows=2, cut="gate"),
    Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up.weight", rows=2, cut="up"),
    Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down.weight"),
)
_TABLES = {"gpt2": (_GPT2, _GPT2_BLOCK), "llama": (_LLAMA, _LLAMA_BLOCK)}


@dataclass(frozen=True)
class Link:
    """A stored array: the box of a logical tensor that it is, the order of axes, its shape."""

    stored: str
    tensor: str
    box: Box
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]


def links(model: ModelConfig, catalog: Catalog) -> Iterator[Link]:
    """Every array of a model, in the order of our catalog."""
    head, block = _TABLES[model.family]
    rows: dict[str, list[tuple[str, Row]]] = {}
    for row in head:
        rows.setdefault(row.tensor, []).append((row.stored, row))
    for i in range(model.layers):
        for row in block:
            rows.setdefault(row.tensor.format(i=i), []).append((row.stored.format(i=i), row))
    for tensor in catalog:
        for stored, row in rows[tensor.name]:
            box = _cut(whole(tensor.shape), row.cut)
            lengths = [box.shape[axis] for axis in row.axes or range(len(box.shape))]
            first, second = lengths[: row.rows], lengths[row.rows :]
            shape = (math.prod(first), math.prod(second)) if row.rows else (math.prod(second),)
            yield Link(stored, tensor.name, box, row.axes, shape)


def _cut(box: Box, name: str) -> Box:
    """The part of a fused tensor: query, key and value lie on axis 1, gate and up on axis 0."""
    if not name:
        return box
    axis = 1 if name in "qkv" else 0
    last = box.shape[axis] - 1
    start, stop = {
        "q": (0, last - 1), "k": (last - 1, last), "v": (last, last + 1),
        "gate": (0, 1), "up": (1, 2),
    }[name]  # fmt: skip
    offset, shape = list(box.offset), list(box.shape)
    offset[axis], shape[axis] = start, stop - start
    return Box(tuple(offset), tuple(shape))
