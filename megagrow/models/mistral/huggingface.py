"""Mistral as Hugging Face's transformers stores it: LLaMA's names, and `sliding_window`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megagrow.config import ModelConfig
from megagrow.models.llama.huggingface import CARRIED, read_llama, write_llama
from megagrow.models.llama.huggingface import HUGGINGFACE as LLAMA

_UNSET_WINDOW = 4096  # transformers' default where config.json has no such key


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    window = config.get("sliding_window", _UNSET_WINDOW)
    return {**read_llama(config, where, family="mistral"), "window": window}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**write_llama(model), "sliding_window": model.window}


HUGGINGFACE = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    title="Mistral",
    read=_read,
    write=_write,
    carried=CARRIED | {"sliding_window"},
)
