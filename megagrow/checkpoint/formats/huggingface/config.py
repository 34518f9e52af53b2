"""config.json of a GPT-2 or LLaMA model of Hugging Face, and our section `model`, both ways."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from megagrow.checkpoint.interface.accounting import names_in
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.config import ModelConfig
from megagrow.config.load import in_words
from megagrow.errors import CheckpointError

# Every key of a config.json is one of these, or refused by its name: a key that nobody here has
# thought of may change what the model computes.

# Read below.
_CARRIED: Mapping[str, frozenset[str]] = {
    "gpt2": names_in(
        "model_type n_layer n_embd n_head n_inner n_positions vocab_size "
        "tie_word_embeddings resid_pdrop embd_pdrop attn_pdrop layer_norm_epsilon "
        "initializer_range"
    ),
    "llama": names_in(
        "model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads "
        "head_dim intermediate_size max_position_embeddings vocab_size tie_word_embeddings "
        "rms_norm_eps rope_theta rope_parameters rope_scaling initializer_range"
    ),
}
# What changes what the model computes, with the values that ours computes too; a setting that is
# absent has the first.
_COMMON: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}
_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "gpt2": {
        **_COMMON,
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    "llama": {
        **_COMMON,
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0, 0),
        "partial_rotary_factor": (1.0, 1, None),
        "rope_interleaved": (False,),
        "use_sliding_window": (False,),
    },
}
_TOKENS = "the tokenizer says which tokens begin, end and fill texts"
_GENERATION = "a setting of text generation"
_NOTHING = "changes nothing of what the model computes"
_UNSET = "not set"
_LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(
        names_in(
            "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id "
            "unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id "
            "tokenizer_class prefix"
        ),
        _TOKENS,
    ),
    **dict.fromkeys(
        names_in(
            "max_length max_new_tokens min_length min_new_tokens early_stopping max_time "
            "stop_strings do_sample num_beams num_beam_groups diversity_penalty temperature "
            "top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty "
            "encoder_repetition_penalty length_penalty no_repeat_ngram_size "
            "encoder_no_repeat_ngram_size bad_words_ids force_words_ids constraints "
            "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
            "begin_suppress_tokens num_return_sequences output_scores output_logits "
            "return_dict_in_generate renormalize_logits penalty_alpha cache_implementation "
            "generation_config task_specific_params"
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        names_in(
            "architectures dtype torch_dtype transformers_version _name_or_path _commit_hash "
            "use_cache output_attentions output_hidden_states output_past return_dict "
            "torchscript use_bfloat16 id2label label2id num_labels problem_type finetuning_task "
            "classifier_dropout summary_type summary_use_proj summary_activation "
            "summary_proj_to_labels summary_first_dropout attn_implementation "
            "_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled "
            "gradient_checkpointing chunk_size_feed_forward reorder_and_upcast_attn "
            "pretraining_tp max_sequence_length is_llama_config unsloth_fixed unsloth_version "
            "transformers.js_config"
        ),
        _NOTHING,
    ),
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_model(
    config: Mapping[str, Any], *, where: str, ignore: Collection[str] = ()
) -> tuple[ModelConfig, tuple[LeftOut, ...]]:
    """Our description of the model of a config.json, and the settings that it has no place for.

    Args:
        ignore: settings that a person knows to change nothing.

    Raises:
        CheckpointError: names the setting that our model cannot express, that is damaged, or of
            which is not known what it does.
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
    except (ValidationError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else in_words(error)
        raise CheckpointError(
            f"{where}: describes no model that megagrow can express", found=found[:500]
        ) from None
    return model, tuple(_settings_left_out(config, family, model, where, ignore))


def _settings_left_out(
    config: Mapping[str, Any],
    family: str,
    model: ModelConfig,
    where: str,
    ignore: Collection[str],
) -> Iterator[LeftOut]:
    for key, value in config.items():
        if key in _CARRIED[family] or key in _ONLY[family]:
            continue
        if family == "gpt2" and key == "n_ctx" and value == model.sequence:
            continue  # the old second name of n_positions
        reason = _LEFT_OUT.get(key, _UNSET if value is None else None)
        if key in ignore:
            reason = "ignored, as you asked"
        if reason is None:
            raise CheckpointError(
                f"{where}: {key[:200]}: not a setting of a {family} model that megagrow knows",
                found=repr(value)[:200],
                fix=f"if it changes nothing of what the model computes: --ignore {key[:200]}",
            )
        yield LeftOut(f"config.json: {key[:200]}", reason)


def _read_gpt2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
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


def _read_llama(config: Mapping[str, Any], where: str) -> dict[str, Any]:
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
    """The base of the rotary frequencies, wherever it stands; anything but plain ones is refused.

    transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, unless
    there is a `rope_scaling`: the three must agree.
    """
    told = {"rope_theta": config.get("rope_theta")}
    for section in ("rope_scaling", "rope_parameters"):
        rope = config.get(section) or {}
        if not isinstance(rope, Mapping):
            raise TypeError(f"{section} is {rope!r:.80}")
        for key, value in rope.items():
            if value is not None and key not in _ROPE:
                raise _unknown(where, f"{section}.{key[:80]}", value, None)
        for key in ("rope_type", "type"):
            if rope.get(key, "default") != "default":
                raise _unknown(where, f"{section}.{key}", rope[key], "default")
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise _unknown(where, f"{section}.partial_rotary_factor", rope, 1.0)
        told[f"{section}.rope_theta"] = rope.get("rope_theta")
    bases = {name: base for name, base in told.items() if base is not None}
    if len(set(bases.values())) > 1:
        raise CheckpointError(
            f"{where}: says twice what the base of the rotary frequencies is", found=bases
        )
    return next(iter(bases.values()), 1e4)


def write_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        CheckpointError: names the setting that Hugging Face's model of the family cannot express.
    """
    common = {
        "model_type": model.family,
        "vocab_size": model.vocabulary,
        # One number is all that it can say; without the key it is transformers' default.
        **({} if model.stds.matrices is None else {"initializer_range": model.stds.matrices}),
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
                fix="convert to native or dcp",
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
