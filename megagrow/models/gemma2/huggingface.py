"""Gemma 2 as Hugging Face's transformers stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megagrow.config import ModelConfig
from megagrow.models.common.huggingface import Row, no_such_feature
from megagrow.models.llama.huggingface import (
    CARRIED,
    DOWN,
    ONLY,
    OUT,
    QKV,
    UP,
    read_llama,
    write_llama,
)
from megagrow.models.llama.huggingface import HUGGINGFACE as LLAMA

_NORMS = tuple(
    Row(f"model.layers.{{i}}.{theirs}.weight", f"layers.{{i}}.{ours}.weight", rows=0)
    for ours, theirs in (
        ("attention.norm", "input_layernorm"),
        ("attention.post_norm", "post_attention_layernorm"),
        ("mlp.norm", "pre_feedforward_layernorm"),
        ("mlp.post_norm", "post_feedforward_layernorm"),
    )
)
_OWN = (
    "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping",
    "attn_logit_softcapping",
)  # fmt: skip


def _pattern(layers: int) -> list[str]:
    """Every second layer attends to all tokens, the first to a window."""
    kinds = ("sliding_attention", "full_attention")
    return [kinds[layer % 2] for layer in range(layers)]


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    told = config.get("layer_types")
    layers = config["num_hidden_layers"]
    if told is not None and list(told) != _pattern(layers):
        raise no_such_feature(where, "layer_types", told, "sliding and full attention by turns")
    window = config.get("sliding_window", 4096)
    unset = {"head_dim": 256, "tie_word_embeddings": True}
    return {
        **read_llama({**unset, **config}, where, family="gemma2"),
        "window": window,
        "full_every": None if window is None else 2,
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_softcap": config.get("attn_logit_softcapping", 50.0),
        "logit_softcap": config.get("final_logit_softcapping", 30.0),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    settings = write_llama(model)
    del settings["hidden_act"]
    scale = model.attention_scale or model.head_dim**-0.5
    return {
        **settings,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": model.window,
        "layer_types": _pattern(model.layers),
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": model.attention_softcap,
        "final_logit_softcapping": model.logit_softcap,
    }


def _refusal(model: ModelConfig) -> tuple[str, str] | None:
    if (scale := model.attention_scale) is not None:
        number = scale**-2
        if abs(number - round(number)) > 1e-6 * number:
            return (
                "transformers' Gemma 2 has 1 / attention_scale squared as an integer",
                f"{number}",
            )
    if model.window is not None and model.full_every != 2:
        return (
            "transformers' Gemma 2 has windows in every other layer",
            f"full_every {model.full_every}",
        )
    return None


HUGGINGFACE = replace(
    LLAMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    title="Gemma 2",
    block=(_NORMS[0], *QKV, OUT, _NORMS[1], _NORMS[2], *UP, DOWN, _NORMS[3]),
    read=_read,
    write=_write,
    carried=CARRIED | set(_OWN),
    only={
        **ONLY,
        # Ignored by transformers, which reads the second key; old files have both.
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (None, False),
        "cache_implementation": ("hybrid", None),
    },
    refusal=_refusal,
)
