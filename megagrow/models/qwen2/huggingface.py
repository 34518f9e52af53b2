"""Qwen2 as Hugging Face's transformers stores it: LLaMA's names, with biases of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megagrow.config import ModelConfig
from megagrow.models.common.huggingface import Row, head_dim_follows, no_such_feature
from megagrow.models.llama.huggingface import (
    CARRIED,
    DOWN,
    NORMS,
    ONLY,
    OUT,
    QKV,
    UP,
    read_llama,
    write_llama,
)
from megagrow.models.llama.huggingface import HUGGINGFACE as LLAMA

_BIASES = tuple(
    Row(
        f"model.layers.{{i}}.self_attn.{cut}_proj.bias",
        "layers.{i}.attention.qkv.bias",
        rows=0,
        cut=cut,
    )
    for cut in "qkv"
)
# Settings of windows, which have no effect without `use_sliding_window`.
WINDOWS = frozenset({"sliding_window", "max_window_layers", "layer_types"})


def require_full_attention(config: Mapping[str, Any], where: str) -> None:
    """Check that no layer has a window.

    Raises:
        CheckpointError: one has.
    """
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise no_such_feature(where, "layer_types", sorted(map(str, kinds)), "full_attention")


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    require_full_attention(config, where)
    return read_llama(config, where, family="qwen2")


def _write(model: ModelConfig) -> dict[str, Any]:
    settings = write_llama(model)
    del settings["attention_bias"]  # Qwen2 has no such key: its biases are fixed
    return {**settings, "use_sliding_window": False}


HUGGINGFACE = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    title="Qwen2",
    block=(NORMS[0], *QKV, *_BIASES, OUT, NORMS[1], *UP, DOWN),
    read=_read,
    write=_write,
    carried=CARRIED | WINDOWS,
    only={key: values for key, values in ONLY.items() if key != "attention_bias"},
    refusal=head_dim_follows("Qwen2"),
)
