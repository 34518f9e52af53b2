"""OLMo 2 as Hugging Face's transformers stores it."""

from __future__ import annotations

from dataclasses import replace

from megagrow.models.common.huggingface import Row, head_dim_follows
from megagrow.models.llama.huggingface import (
    CARRIED,
    DOWN,
    HEAD_NORMS,
    OUT,
    QKV,
    UP,
    one_eps,
    read_llama,
    write_llama,
)
from megagrow.models.llama.huggingface import HUGGINGFACE as LLAMA

POST_NORMS = (
    Row(
        "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.attention.post_norm.weight",
        rows=0,
    ),
    Row(
        "model.layers.{i}.post_feedforward_layernorm.weight",
        "layers.{i}.mlp.post_norm.weight",
        rows=0,
    ),
)


HUGGINGFACE = replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    title="OLMo 2",
    block=(*QKV, *HEAD_NORMS, OUT, POST_NORMS[0], *UP, DOWN, POST_NORMS[1]),
    read=lambda config, where: read_llama({"rms_norm_eps": 1e-5, **config}, where, family="olmo2"),
    write=write_llama,
    carried=CARRIED,
    not_stored=one_eps,
    refusal=head_dim_follows("OLMo 2"),
)
