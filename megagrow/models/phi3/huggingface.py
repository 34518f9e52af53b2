"""Phi-3 as Hugging Face's transformers stores it: queries, keys and values are one array, q first.

So are gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megagrow.config import ModelConfig
from megagrow.models.common.huggingface import Row, head_dim_follows
from megagrow.models.llama.huggingface import (
    CARRIED,
    DOWN,
    NORMS,
    ONLY,
    OUT,
    read_llama,
    read_rope,
    write_llama,
)
from megagrow.models.llama.huggingface import HUGGINGFACE as LLAMA

_QKV = tuple(
    Row(
        "model.layers.{i}.self_attn.qkv_proj.weight",
        "layers.{i}.attention.qkv.weight",
        rows=3,
        cut=cut,
    )
    for cut in "qkv"
)
_UP = Row("model.layers.{i}.mlp.gate_up_proj.weight", "layers.{i}.mlp.up.weight", rows=2)


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    _, _, fraction = read_rope(config, where)
    sections = ("rope_parameters", "rope_scaling")
    whole = {key: _without_share(config[key]) for key in sections if config.get(key)}
    plain = {**config, **whole, "partial_rotary_factor": None}
    model = read_llama({"rms_norm_eps": 1e-5, **plain}, where, family="phi3")
    return {**model, "rope_fraction": fraction, "window": config.get("sliding_window")}


def _without_share(rope: Any) -> Any:
    if not isinstance(rope, Mapping):
        return rope
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


def _write(model: ModelConfig) -> dict[str, Any]:
    settings = write_llama(model)
    share = {"partial_rotary_factor": model.rope_fraction}
    return {
        **settings,
        **share,
        "rope_parameters": {**settings["rope_parameters"], **share},
        "original_max_position_embeddings": model.sequence,
        "sliding_window": model.window,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


HUGGINGFACE = replace(
    LLAMA,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    title="Phi-3",
    block=(NORMS[0], *_QKV, OUT, NORMS[1], _UP, DOWN),
    read=_read,
    write=_write,
    # The last key has an effect only with a scaling that is refused.
    carried=CARRIED
    | {"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"},
    only={**ONLY, "resid_pdrop": (0.0, 0), "embd_pdrop": (0.0, 0)},
    refusal=head_dim_follows("Phi-3"),
)
