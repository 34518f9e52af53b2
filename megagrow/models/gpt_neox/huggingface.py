"""GPT-NeoX as Hugging Face's transformers stores it: q, k and v are fused head by head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megagrow.config import ModelConfig
from megagrow.models.common.huggingface import COMMON, HuggingFace, Row, head_dim_follows, keys
from megagrow.models.llama.huggingface import read_rope, write_rope

_ENDS = (
    Row("gpt_neox.embed_in.weight", "embedding.token"),
    Row("gpt_neox.final_layer_norm.weight", "final_norm.weight", rows=0),
    Row("gpt_neox.final_layer_norm.bias", "final_norm.bias", rows=0),
    Row("embed_out.weight", "output.weight"),
)
# Ours, theirs, and the number of axes of the outputs.
_LAYERS = (
    ("attention.norm", "input_layernorm", 0),
    ("attention.qkv", "attention.query_key_value", 3),
    ("attention.out", "attention.dense", 1),
    ("mlp.norm", "post_attention_layernorm", 0),
    ("mlp.up", "mlp.dense_h_to_4h", 1),
    ("mlp.down", "mlp.dense_4h_to_h", 1),
)
_BLOCK = tuple(
    Row(
        f"gpt_neox.layers.{{i}}.{theirs}.{kind}",
        f"layers.{{i}}.{ours}.{kind}",
        rows=rows if kind == "weight" else 0,
    )
    for ours, theirs, rows in _LAYERS
    for kind in ("weight", "bias")
)


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    theta, scaling, fraction = read_rope(
        {"rotary_pct": 0.25, **config} if "rope_parameters" not in config else config,
        where,
        base="rotary_emb_base",
        share="rotary_pct",
    )
    return {
        "family": "gpt_neox",
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": heads,
        "ffn": config["intermediate_size"],
        "sequence": config["max_position_embeddings"],
        "vocab": config["vocab_size"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_fraction": fraction,
        "dropout": config.get("hidden_dropout", 0.0),
        "init_std": config.get("initializer_range", 0.02),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    rope = write_rope(model)
    share = model.rope_fraction
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.sequence,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        # transformers 4 reads the first two, 5 the last.
        "rotary_emb_base": model.rope_theta,
        "rotary_pct": share,
        **{key: value for key, value in rope.items() if key != "rope_theta"},
        "rope_parameters": {**rope["rope_parameters"], "partial_rotary_factor": share},
    }


def _refusal(model: ModelConfig) -> tuple[str, str] | None:
    if model.kv_groups != model.heads:
        return "transformers' GPT-NeoX has no grouped queries", f"kv_heads {model.kv_groups}"
    return head_dim_follows("GPT-NeoX")(model)


def _not_stored(model: ModelConfig) -> Iterator[tuple[str, str]]:
    if model.dropout:
        yield f"dropout {model.dropout} of embeddings", "transformers applies it to them as well"


HUGGINGFACE = HuggingFace(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    title="GPT-NeoX",
    ends=_ENDS,
    block=_BLOCK,
    read=_read,
    write=_write,
    carried=keys(
        "model_type num_hidden_layers hidden_size num_attention_heads intermediate_size "
        "max_position_embeddings vocab_size tie_word_embeddings layer_norm_eps rotary_pct "
        "rotary_emb_base rope_theta rope_parameters rope_scaling partial_rotary_factor "
        "hidden_dropout initializer_range"
    ),
    only={
        **COMMON,
        "hidden_act": ("gelu",),
        "use_parallel_residual": (True,),
        "attention_bias": (True,),
        "is_decoder": (False, True),
    },
    repeats={"attention_dropout": "dropout"},
    refusal=_refusal,
    masks=re.compile(r"gpt_neox\.layers\.\d{1,6}\.attention\.(bias|masked_bias)"),
    frequencies=re.compile(r"gpt_neox\.(layers\.\d{1,6}\.attention\.)?rotary_emb\.inv_freq"),
)
