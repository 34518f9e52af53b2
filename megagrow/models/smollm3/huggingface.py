"""SmolLM3 as Hugging Face's transformers stores it: LLaMA's names, and layers without positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megagrow.config import ModelConfig
from megagrow.models.common.huggingface import no_such_feature
from megagrow.models.llama.huggingface import CARRIED, read_llama, write_llama
from megagrow.models.llama.huggingface import HUGGINGFACE as LLAMA
from megagrow.models.qwen2.huggingface import WINDOWS, require_full_attention

_UNSET_INTERVAL = 4  # transformers' default where config.json has no such key


def _pattern(layers: int, every: int | None) -> list[int]:
    """1 for layers with positions, 0 for those without."""
    return [int(every is None or (layer + 1) % every != 0) for layer in range(layers)]


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    require_full_attention(config, where)
    layers = config["num_hidden_layers"]
    interval = config.get("no_rope_layer_interval", _UNSET_INTERVAL)
    told = config.get("no_rope_layers")
    if told is None:
        told = _pattern(layers, interval)
    every = list(told).index(0) + 1 if 0 in told else None
    if list(told) != _pattern(layers, every):
        raise no_such_feature(where, "no_rope_layers", told, "every k-th layer")
    return {**read_llama(config, where, family="smollm3"), "no_rope_every": every}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        **write_llama(model),
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layers": _pattern(model.layers, model.no_rope_every),
        "no_rope_layer_interval": model.no_rope_every or model.layers + 1,
    }


HUGGINGFACE = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    title="SmolLM3",
    read=_read,
    write=_write,
    carried=CARRIED | WINDOWS | {"no_rope_layers", "no_rope_layer_interval"},
)
