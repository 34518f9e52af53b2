"""config.json of a GPT-2 or LLaMA model of Hugging Face, and our section `model`, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError

# Settings that change what the model computes, with the values that ours computes too. A
# setting that is absent has the first. Whatever is not listed here or read below changes nothing.
_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "quantization_config": (None,),
    },
    "llama": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "attention_dropout": (0.0, 0),
        "partial_rotary_factor": (1.0, 1, None),
        "is_encoder_decoder": (False,),
        "quantization_config": (None,),
    },
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def read_model(config: Mapping[str, Any], *, where: str) -> ModelConfig:
    """Our description of the model of a config.json.

    Raises:
        CheckpointError: names the setting that our model cannot express, or that is damaged.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _ONLY:
        raise CheckpointError(
            f"{where}: model_type is none that megagrow can express",
            found=repr(family)[:80],
            expected=", ".join(_ONLY),
        )
    for key, known in _ONLY[family].items():
        if config.get(key, known[0]) not in known:
            raise _unknown(where, key, config[key], known[0])
    read = _read_gpt2 if family == "gpt2" else _read_llama
    try:
        model = ModelConfig(**read(config, where))
        if model.vocab is None:
            raise TypeError("vocab_size is not a number")
        return model
    except (ValidationError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{where}: describes no model that megagrow can express", found=found[:500]
        ) from None


def _read_gpt2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    dropouts = {key: config.get(key, 0.1) for key in _DROPOUTS}
    if len(set(dropouts.values())) > 1:
        raise CheckpointError(
            f"{where}: {', '.join(_DROPOUTS)} differ, and megagrow has one dropout",
            found=dropouts,
            mend="set them equal in a copy of config.json (they do not change the weights)",
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


def _read_llama(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise TypeError(f"rope_parameters is {rope!r:.80}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise _unknown(where, "rope_parameters.rope_type", rope.get("rope_type"), "default")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unknown(where, "rope_parameters.partial_rotary_factor", rope, 1.0)
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
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e4)),
        "init_std": config.get("initializer_range", 0.02),
    }


def write_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        CheckpointError: names the setting that Hugging Face's model of the family cannot express.
    """
    common = {
        "model_type": model.family,
        "vocab_size": model.vocabulary,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        # Which tokens begin and end a text is the tokenizer's to tell.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.family == "gpt2":
        if model.kv_groups != model.heads or model.head_dim * model.heads != model.hidden:
            raise CheckpointError(
                "Hugging Face's GPT-2 has one key/value head for each head, hidden / heads wide",
                found=f"heads {model.heads}, kv_heads {model.kv_groups}, "
                f"head_dim {model.head_dim}, hidden {model.hidden}",
                mend="convert to native or dcp",
            )
        return {
            "architectures": ["GPT2LMHeadModel"],
            **common,
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
    return {
        "architectures": ["LlamaForCausalLM"],
        **common,
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


def _unknown(where: str, key: str, found: Any, expected: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: {key}: megagrow's model has no such feature",
        found=repr(found)[:200],
        expected=repr(expected),
    )
