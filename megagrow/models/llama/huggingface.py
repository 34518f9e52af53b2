"""LLaMA as Hugging Face's transformers stores it.

Queries, keys and values are separate, and so are gate and up. Both use the half-split pairing of
rotary features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.models.common.huggingface import COMMON, HuggingFace, Row, keys, no_such_feature

_ENDS = (
    Row("model.embed_tokens.weight", "embedding.token"),
    Row("model.norm.weight", "final_norm.weight", rows=0),
    Row("lm_head.weight", "output.weight"),
)
_BLOCK = (
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
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim")
    natural = config["hidden_size"] / heads
    return {
        "family": "llama",
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": None if head_dim == natural else head_dim,
        "ffn": config["intermediate_size"],
        "sequence": config["max_position_embeddings"],
        "vocab": config["vocab_size"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": _read_rope(config, where),
        "init_std": config.get("initializer_range", 0.02),
    }


def _read_rope(config: Mapping[str, Any], where: str) -> float:
    """The base of the rotary frequencies, wherever it is given; only plain RoPE is accepted.

    transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 reads `rope_parameters`
    unless there is a `rope_scaling`: all three must agree.
    """
    given = {"rope_theta": config.get("rope_theta")}
    for section in ("rope_scaling", "rope_parameters"):
        rope = config.get(section) or {}
        if not isinstance(rope, Mapping):
            raise TypeError(f"{section} is {rope!r:.80}")
        for key, value in rope.items():
            if value is not None and key not in _ROPE:
                raise no_such_feature(where, f"{section}.{key[:80]}", value, None)
        for key in ("rope_type", "type"):
            if rope.get(key, "default") != "default":
                raise no_such_feature(where, f"{section}.{key}", rope[key], "default")
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise no_such_feature(where, f"{section}.partial_rotary_factor", rope, 1.0)
        given[f"{section}.rope_theta"] = rope.get("rope_theta")
    bases = {name: base for name, base in given.items() if base is not None}
    if len(set(bases.values())) > 1:
        raise CheckpointError(
            f"{where}: gives the base of the rotary frequencies twice", found=bases
        )
    return next(iter(bases.values()), 1e4)


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_groups,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.sequence,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        # The first key is read by transformers 4, the second by 5.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def _not_stored(model: ModelConfig) -> Iterator[tuple[str, str]]:
    if model.dropout:
        yield f"dropout {model.dropout}", "transformers' LLaMA has no dropout"


HUGGINGFACE = HuggingFace(
    model_type="llama",
    architecture="LlamaForCausalLM",
    title="LLaMA",
    ends=_ENDS,
    block=_BLOCK,
    read=_read,
    write=_write,
    carried=keys(
        "model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads "
        "head_dim intermediate_size max_position_embeddings vocab_size tie_word_embeddings "
        "rms_norm_eps rope_theta rope_parameters rope_scaling initializer_range"
    ),
    only={
        **COMMON,
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0, 0),
        "partial_rotary_factor": (1.0, 1, None),
        "rope_interleaved": (False,),
        "use_sliding_window": (False,),
    },
    not_stored=_not_stored,
    frequencies=re.compile(r"model\.(layers\.\d{1,6}\.self_attn\.)?rotary_emb\.inv_freq"),
)
