"""GPT-2 as Hugging Face's transformers stores it.

Weights of linear layers are [inputs, outputs], and query, key and value are three blocks of
outputs; megagrow's are [kv_group, query + 2, head_dim, embed].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.models.common.huggingface import COMMON, HuggingFace, Row, keys

_ENDS = (
    Row("transformer.wte.weight", "embedding.token"),
    Row("transformer.wpe.weight", "embedding.position"),
    Row("transformer.ln_f.weight", "final_norm.weight", rows=0),
    Row("transformer.ln_f.bias", "final_norm.bias", rows=0),
    Row("lm_head.weight", "output.weight"),
)
_BLOCK = (
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
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    dropouts = {key: config.get(key, 0.1) for key in _DROPOUTS}
    if len(set(dropouts.values())) > 1:
        raise CheckpointError(
            f"{where}: {', '.join(_DROPOUTS)} differ, and megagrow has one dropout",
            found=dropouts,
            fix="set them equal in a copy of config.json (they do not change the weights)",
        )
    return {
        "family": "gpt2",
        "layers": config["n_layer"],
        "hidden": config["n_embd"],
        "heads": config["n_head"],
        "ffn": config.get("n_inner") or 4 * config["n_embd"],
        "sequence": config["n_positions"],
        "vocab": config["vocab_size"],
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "dropout": dropouts["resid_pdrop"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "init_std": config.get("initializer_range", 0.02),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.layers,
        "n_embd": model.hidden,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "n_positions": model.sequence,
        "n_ctx": model.sequence,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        **dict.fromkeys(_DROPOUTS, model.dropout),
    }


def _refusal(model: ModelConfig) -> tuple[str, str] | None:
    if model.kv_groups == model.heads and model.head_dim * model.heads == model.hidden:
        return None
    return (
        "Hugging Face's GPT-2 has one key/value head for each head, hidden / heads wide",
        f"heads {model.heads}, kv_heads {model.kv_groups}, "
        f"head_dim {model.head_dim}, hidden {model.hidden}",
    )


HUGGINGFACE = HuggingFace(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    title="GPT-2",
    ends=_ENDS,
    block=_BLOCK,
    read=_read,
    write=_write,
    carried=keys(
        "model_type n_layer n_embd n_head n_inner n_positions vocab_size "
        "tie_word_embeddings resid_pdrop embd_pdrop attn_pdrop layer_norm_epsilon "
        "initializer_range"
    ),
    only={
        **COMMON,
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    repeats={"n_ctx": "sequence"},  # the old second name of n_positions
    refusal=_refusal,
    prefix="transformer.",
    masks=re.compile(r"(transformer\.)?h\.\d{1,6}\.attn\.(bias|masked_bias)"),
)
