"""Translate between a Hugging Face config.json and our `model` section.

Differences between families are in `megagrow.models.<family>.huggingface`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from megagrow.checkpoint.interface.accounting import names_in
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.config import ModelConfig
from megagrow.config.load import in_words
from megagrow.errors import CheckpointError
from megagrow.models.common.huggingface import HuggingFace, no_such_feature
from megagrow.models.registry import FAMILIES, family_of

# Every key of a config.json is listed here or refused by name: an unknown key may change what
# the model computes.

_TOKENS = "the tokenizer says which tokens begin, end and fill texts"
_GENERATION = "a setting of text generation"
_NOTHING = "does not affect what the model computes"
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


_NUMBER = re.compile(r"\s*-?\d+(\.\d*)?([eE][-+]?\d+)?\s*")


def read_model(
    config: Mapping[str, Any], *, where: str, ignore: Collection[str] = ()
) -> tuple[ModelConfig, tuple[LeftOut, ...]]:
    """Our description of the model of a config.json, and the settings that it cannot hold.

    Args:
        ignore: settings that the user declares harmless.

    Raises:
        CheckpointError: names the setting that our model cannot express, that is damaged, or
            whose effect is unknown.
    """
    stated, known = config.get("model_type"), _known()
    if not isinstance(stated, str) or stated not in known:
        raise CheckpointError(
            f"{where}: megagrow does not support this model_type",
            found=repr(stated)[:80],
            expected=", ".join(known),
        )
    family = known[stated]
    for key, values in family.only.items():
        if config.get(key, values[0]) not in values:
            raise no_such_feature(where, key, config[key], values[0])
    try:
        model = ModelConfig(**family.read(config, where))
        if model.vocab is None:
            raise TypeError("vocab_size is not a number")
    except (ValidationError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else in_words(error)
        texts = [key for key, v in config.items() if isinstance(v, str) and _NUMBER.fullmatch(v)]
        if texts:
            found = ", ".join(f"{key}: {config[key]!r}, text and not a number" for key in texts)
        raise CheckpointError(
            f"{where}: describes no model that megagrow can express", found=found[:500]
        ) from None
    return model, tuple(_settings_left_out(config, family, model, where, ignore))


def _settings_left_out(
    config: Mapping[str, Any],
    family: HuggingFace,
    model: ModelConfig,
    where: str,
    ignore: Collection[str],
) -> Iterator[LeftOut]:
    for key, value in config.items():
        if key in family.carried or key in family.only:
            continue
        if key in family.repeats and value == getattr(model, family.repeats[key]):
            continue
        reason = _LEFT_OUT.get(key, _UNSET if value is None else None)
        if key in ignore:
            reason = "ignored, as you asked"
        if reason is None:
            raise CheckpointError(
                f"{where}: {key[:200]}: not a setting of a {family.model_type} model that "
                "megagrow knows",
                found=repr(value)[:200],
                fix="if it does not affect what the model computes: launch/convert.py "
                f"--ignore {key[:200]} (in a run: init.ignore)",
            )
        yield LeftOut(f"config.json: {key[:200]}", reason)


def stored_as(model: ModelConfig) -> HuggingFace:
    """How a model is stored.

    Raises:
        CheckpointError: Hugging Face has no model of this family.
    """
    family = family_of(model)
    if family.huggingface is None:
        raise CheckpointError(
            f"Hugging Face has no model of family {family.name} that megagrow knows",
            fix="convert to native or dcp",
        )
    return family.huggingface


def _known() -> dict[str, HuggingFace]:
    stored = (family.huggingface for family in FAMILIES.values())
    return {one.model_type: one for one in stored if one is not None}


def write_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        CheckpointError: names the setting that Hugging Face's model of the family cannot express.
    """
    family = stored_as(model)
    refusal = family.refusal(model)
    if refusal is not None:
        raise CheckpointError(refusal[0], found=refusal[1], fix="convert to native or dcp")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocabulary,
        # config.json has only one number; without the key, transformers' default applies.
        **({} if model.stds.matrices is None else {"initializer_range": model.stds.matrices}),
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        # The tokenizer says which tokens begin and end a text.
        "bos_token_id": None,
        "eos_token_id": None,
        **family.write(model),
    }
