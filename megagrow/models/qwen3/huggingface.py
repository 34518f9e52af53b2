"""Qwen3 as Hugging Face's transformers stores it: LLaMA's names, and norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megagrow.models.llama.huggingface import (
    CARRIED,
    DOWN,
    HEAD_NORMS,
    NORMS,
    OUT,
    QKV,
    UP,
    one_eps,
    read_llama,
    write_llama,
)
from megagrow.models.llama.huggingface import HUGGINGFACE as LLAMA
from megagrow.models.qwen2.huggingface import WINDOWS, require_full_attention


def _read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    require_full_attention(config, where)
    unset = {"head_dim": 128}  # transformers' default where config.json has no such key
    return read_llama({**unset, **config}, where, family="qwen3")


HUGGINGFACE = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    title="Qwen3",
    block=(NORMS[0], *QKV, *HEAD_NORMS, OUT, NORMS[1], *UP, DOWN),
    read=_read,
    write=lambda model: {**write_llama(model), "use_sliding_window": False},
    carried=CARRIED | WINDOWS,
    not_stored=one_eps,
)
