"""LLaMA as Hugging Face's transformers stores it.

Queries, keys and values are separate, and so are gate and up. Both use the half-split pairing of
rotary features. Families that are stored in nearly the same way build on the tables and functions
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.models.common.huggingface import COMMON, HuggingFace, Row, keys, no_such_feature

ENDS = (
    Row("model.embed_tokens.weight", "embedding.token"),
    Row("model.norm.weight", "final_norm.weight", rows=0),
    Row("lm_head.weight", "output.weight"),
)
NORMS = (
    Row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention.norm.weight", rows=0),
    Row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp.norm.weight", rows=0),
)
QKV = tuple(
    Row(
        f"model.layers.{{i}}.self_attn.{cut}_proj.weight",
        "layers.{i}.attention.qkv.weight",
        rows=3,
        cut=cut,
    )
    for cut in "qkv"
)
OUT = Row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.out.weight")
UP = (
    Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up.weight", rows=2, cut="gate"),
    Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up.weight", rows=2, cut="up"),
)
DOWN = Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down.weight")
HEAD_NORMS = tuple(
    Row(
        f"model.layers.{{i}}.self_attn.{cut}_norm.weight",
        f"layers.{{i}}.attention.{whose}_norm.weight",
        rows=0,
    )
    for cut, whose in (("q", "query"), ("k", "key"))
)
MATRICES = (*QKV, OUT, *UP, DOWN)

# Keys of config.json that `read_llama` reads.
CARRIED = keys(
    "model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads "
    "head_dim intermediate_size max_position_embeddings vocab_size tie_word_embeddings "
    "rms_norm_eps rope_theta rope_parameters rope_scaling initializer_range"
)
ONLY: Mapping[str, tuple[Any, ...]] = {
    **COMMON,
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0, 0),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
}
FREQUENCIES = re.compile(r"model\.(layers\.\d{1,6}\.self_attn\.)?rotary_emb\.inv_freq")

_LLAMA3 = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_sequence": "original_max_position_embeddings",
}


def read_llama(config: Mapping[str, Any], where: str, *, family: str) -> dict[str, Any]:
    """The section `model` of a model that is configured like LLaMA.

    Raises:
        CheckpointError, KeyError, TypeError, ValueError: there is no such model.
    """
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim")
    natural = config["hidden_size"] / heads
    theta, scaling, fraction = read_rope(config, where)
    if fraction != 1.0:
        raise no_such_feature(where, "partial_rotary_factor", fraction, 1.0)
    return {
        "family": family,
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
        "rope_theta": theta,
        "rope_scaling": scaling,
        "init_std": config.get("initializer_range", 0.02),
    }


def read_rope(
    config: Mapping[str, Any], where: str, *, base: str = "rope_theta", share: str = ""
) -> tuple[float, dict[str, Any] | None, float]:
    """(base, scaling, share of the features that are turned) of rotary positions.

    transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 reads `rope_parameters`
    unless there is a `rope_scaling`: all three must agree.

    Args:
        base, share: keys of config.json with which a family gives them outside these sections.

    Raises:
        CheckpointError: a kind of scaling that megagrow does not have, or contradictions.
    """
    bases, shares = {base: config.get(base)}, {}
    shares["partial_rotary_factor"] = config.get("partial_rotary_factor")
    if share:
        shares[share] = config.get(share)
    scalings: dict[str, dict[str, Any] | None] = {}
    for section in ("rope_scaling", "rope_parameters"):
        rope = config.get(section) or {}
        if not isinstance(rope, Mapping):
            raise TypeError(f"{section} is {rope!r:.80}")
        if rope:
            scalings[section] = _read_scaling(rope, where, section)
        bases[f"{section}.rope_theta"] = rope.get("rope_theta")
        shares[f"{section}.partial_rotary_factor"] = rope.get("partial_rotary_factor")
    told = list(scalings.values())
    if any(scaling != told[0] for scaling in told):
        raise CheckpointError(
            f"{where}: gives the scaling of the rotary frequencies twice", found=scalings
        )
    return (
        float(_one(bases, 1e4, f"{where}: gives the base of the rotary frequencies twice")),
        told[0] if told else None,
        float(_one(shares, 1.0, f"{where}: gives the share of rotary features twice")),
    )


def _one(found: Mapping[str, Any], default: float, error: str) -> Any:
    """The value that all keys that are set have."""
    given = {key: value for key, value in found.items() if value is not None}
    if len(set(given.values())) > 1:
        raise CheckpointError(error, found=given)
    return next(iter(given.values()), default)


def _read_scaling(rope: Mapping[str, Any], where: str, section: str) -> dict[str, Any] | None:
    """The section `rope_scaling` of our model; None for plain frequencies."""
    kinds = {rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ("default", "linear", "llama3"):
        expected = "default, linear or llama3"
        raise no_such_feature(where, f"{section}.rope_type", [kind, *kinds], expected)
    known = {"default": (), "linear": ("factor",), "llama3": ("factor", *_LLAMA3.values())}
    for key in set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        if key not in known[kind] and rope[key] is not None:
            raise no_such_feature(where, f"{section}.{key[:80]}", rope[key], None)
    if kind == "default":
        return None
    scaling = {"type": kind, "factor": rope["factor"]}
    if kind == "llama3":
        scaling |= {ours: rope[theirs] for ours, theirs in _LLAMA3.items()}
    return scaling


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The settings of rotary positions, for transformers 4 and 5."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        given = model.rope_scaling.model_dump(exclude_none=True)
        rope = {"rope_type": given["type"], "factor": given["factor"]}
        rope |= {theirs: given[ours] for ours, theirs in _LLAMA3.items() if ours in given}
    # transformers 4 reads the first two, 5 the last.
    found: dict[str, Any] = {"rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        found["rope_scaling"] = rope
    return {**found, "rope_parameters": {**rope, "rope_theta": model.rope_theta}}


def write_llama(model: ModelConfig) -> dict[str, Any]:
    """Settings of config.json; the inverse of `read_llama`."""
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
        **write_rope(model),
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def no_dropout(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Training settings that config.json cannot express."""
    if model.dropout:
        yield f"dropout {model.dropout}", "transformers' model has no such dropout"


def one_eps(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """The same for families with norms of queries and keys, which share `rms_norm_eps`."""
    yield from no_dropout(model)
    if model.head_norm_eps not in (None, model.norm_eps):
        yield (
            f"head_norm_eps {model.head_norm_eps} of the norms of queries and keys",
            f"transformers' model uses rms_norm_eps, {model.norm_eps}, for all norms: logits "
            "differ by about as much as eps differs, relative to queries' and keys' mean square",
        )


HUGGINGFACE = HuggingFace(
    model_type="llama",
    architecture="LlamaForCausalLM",
    title="LLaMA",
    ends=ENDS,
    block=(NORMS[0], *QKV, OUT, NORMS[1], *UP, DOWN),
    read=lambda config, where: read_llama(config, where, family="llama"),
    write=lambda model: {**write_llama(model), "mlp_bias": False},
    carried=CARRIED | {"partial_rotary_factor"},
    only=ONLY,
    not_stored=no_dropout,
    frequencies=FREQUENCIES,
)
