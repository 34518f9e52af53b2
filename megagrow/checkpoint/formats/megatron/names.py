"""Translate between our names and configuration and Megatron-LM's names and arguments.

Three naming schemes are read: Megatron-Core's with its own layers (`local`), the same with
Transformer Engine's, whose norms belong to the linear layer that follows, and the classic model's
(`language_model.encoder...`, `language_model.transformer...`).  The first is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megagrow.checkpoint.formats.megatron.arguments import require_known
from megagrow.checkpoint.interface.format import LeftOut, ReadOptions
from megagrow.checkpoint.interface.one_family import one_family
from megagrow.config import ModelConfig
from megagrow.config.families import Architecture
from megagrow.config.load import in_words
from megagrow.errors import CheckpointError
from megagrow.models.registry import FAMILIES, family_of
from megagrow.state.boxes import Box
from megagrow.state.catalog import LogicalTensor
from megagrow.state.layout import Layout
from megagrow.state.placement import split_axis

DIVISOR = 128  # Megatron's default of make_vocab_size_divisible_by

# In the order in which Megatron-Core's layer registers its parameters, which its optimizer uses.
IN_LAYER = {
    "attention.norm": "input_layernorm",
    "attention.out": "self_attention.linear_proj",
    "attention.qkv": "self_attention.linear_qkv",
    "mlp.norm": "pre_mlp_layernorm",
    "mlp.up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
}
_PARTS = {
    **{theirs: ours for ours, theirs in IN_LAYER.items()},
    "self_attention.linear_qkv.layer_norm": "attention.norm",
    "mlp.linear_fc1.layer_norm": "mlp.norm",
    "input_norm": "attention.norm",
    "self_attention.query_key_value": "attention.qkv",
    "attention.query_key_value": "attention.qkv",
    "self_attention.dense": "attention.out",
    "attention.dense": "attention.out",
    "post_attention_layernorm": "mlp.norm",
    "post_attention_norm": "mlp.norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
TOKENS = "embedding.token"
_ENDS = {
    "embedding.word_embeddings.weight": TOKENS,
    "embedding.position_embeddings.weight": "embedding.position",
    "output_layer.weight": "output.weight",
}
TIED_COPIES = ("output_layer.weight", "word_embeddings_for_head.weight")
_LAYER = re.compile(r"(?:decoder|encoder|transformer)\.layers\.(\d{1,6})\.(.+)[._](weight|bias)")
_FINAL = re.compile(r"(?:decoder|encoder|transformer)\.final_(?:layer)?norm\.(weight|bias)")
_NO_PARAMETERS = re.compile(r"(.*\.)?(_extra_state|rotary_pos_emb\.inv_freq|attention_mask)")


def megatron_name(name: str, first_layer: int) -> str:
    """A tensor's Megatron-Core name on a stage whose first layer is our `first_layer`."""
    ends = {ours: theirs for theirs, ours in _ENDS.items()}
    if name in ends:
        return ends[name]
    if name.startswith("final_norm."):
        return name.replace("final_norm", "decoder.final_layernorm", 1)
    _, layer, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"decoder.layers.{int(layer) - first_layer}.{IN_LAYER[part]}.{kind}"


def is_parameter(stored: str) -> bool:
    """Whether a name is a parameter's, not that of extra module state."""
    return _NO_PARAMETERS.fullmatch(stored) is None


def decays(stored: str, axes: int) -> bool:
    """Whether Megatron's optimizer applies weight decay to a parameter."""
    return axes > 1 and not stored.endswith("bias")


def local_layer(stored: str) -> int | None:
    """The number, within its stage, of the layer that a parameter belongs to."""
    match = _LAYER.fullmatch(stored.removeprefix("language_model."))
    return int(match[1]) if match else None


def logical_name(stored: str, first_layer: int) -> str | None:
    """Our name of a parameter; None if our models have no such parameter."""
    plain = stored.removeprefix("language_model.")
    if plain in _ENDS:
        return _ENDS[plain]
    if match := _FINAL.fullmatch(plain):
        return f"final_norm.{match[1]}"
    match = _LAYER.fullmatch(plain)
    part = _PARTS.get(match[2]) if match else None
    if match is None or part is None:
        return None
    return f"layers.{int(match[1]) + first_layer}.{part}.{match[3]}"


# --- shapes -------------------------------------------------------------------------------


def padded_vocabulary(vocabulary: int, tensor: int, divisor: int = DIVISOR) -> int:
    """Rows of Megatron's token table, over all tensor-parallel ranks."""
    multiple = divisor * tensor
    return -(-vocabulary // multiple) * multiple


def local_part(
    tensor: LogicalTensor, layout: Layout, rank: int, padded: int
) -> tuple[Box | None, tuple[int, ...]]:
    """A tensor-parallel rank's part: the box (None if it is all padding) and its shape in the file.

    The box is row-major at the start of the stored tensor; the rest is padding.  Matrices
    are [outputs, inputs].
    """
    axis = split_axis(tensor)
    offset, shape = [0] * len(tensor.shape), list(tensor.shape)
    size = 0
    if axis is not None:
        vocabulary = tensor.axes[axis] == "vocab"
        size = (padded if vocabulary else tensor.shape[axis]) // layout.tensor
        start = min(size * rank, tensor.shape[axis])
        offset[axis], shape[axis] = start, min(start + size, tensor.shape[axis]) - start
    held = list(shape)
    if axis is not None:
        held[axis] = size
    volume = 1
    for n in held:
        volume *= n
    if tensor.name.endswith(".bias") or len(held) == 1:
        stored: tuple[int, ...] = (volume,)
    else:
        # Column-parallel weights end in their one input axis, row-parallel ones start with the
        # output.
        rows = held[0] if tensor.axes[0] == "embed" else volume // held[-1]
        stored = (rows, volume // rows)
    return (Box(tuple(offset), tuple(shape)) if all(shape) else None), stored


# --- arguments ----------------------------------------------------------------------------


def read_model(
    args: Mapping[str, Any], *, where: str, options: ReadOptions, written: str | None = None
) -> tuple[ModelConfig, int, list[LeftOut]]:
    """The model of a checkpoint's arguments, its token table's rows, and what is left out.

    The rows include padding.  The vocabulary is `vocab_size`, else what the user supplies, else all
    rows.

    Args:
        args: Megatron's arguments.
        where: the file, for errors.
        told: what the user says.
        written: the family that megagrow wrote down beside them, if it did.

    Raises:
        CheckpointError: names the argument that our model cannot express, that is missing, or
            whose effect is unknown; or the arguments fit several families.
    """
    left_out = list(require_known(args, where=where, ignore=options.ignore))
    rope = args.get("position_embedding_type") == "rope" or args.get(
        "use_rotary_position_embeddings"
    )
    kinds = {name: _kind(one.architecture) for name, one in FAMILIES.items() if one.megatron}
    kind = (
        args.get("normalization", "LayerNorm"),
        bool(rope),
        bool(args.get("swiglu", False)),
        bool(args.get("add_bias_linear", True)),
    )
    fitting = {name: name for name, wanted in kinds.items() if wanted == kind}
    if written in fitting and options.family is None:
        fitting = {written: written}
    family = one_family(fitting, where=f"{where}: args", family=options.family)
    if family is None:
        names = ("normalization", "rotary positions", "swiglu", "add_bias_linear")
        raise CheckpointError(
            f"{where}: args: none of the families that megagrow reads from Megatron's files",
            found=", ".join(f"{n} {v}" for n, v in zip(names, kind, strict=True)),
            expected="; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in kinds.items()),
        )
    try:
        padded = args["padded_vocab_size"]
        heads = args["num_attention_heads"]
        groups = args.get("num_query_groups") if args.get("group_query_attention") else heads
        model = ModelConfig.model_validate(
            {
                "family": family,
                "layers": args["num_layers"],
                "hidden": args["hidden_size"],
                "heads": heads,
                "kv_heads": groups,
                "head_dim": args.get("kv_channels"),
                "ffn": args.get("ffn_hidden_size") or 4 * args["hidden_size"],
                "sequence": args["max_position_embeddings"],
                "vocab": _vocabulary(args, padded, where, options),
                "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
                "dropout": args.get("hidden_dropout", 0.0),
                "norm_eps": _agreed(args, "norm_epsilon", "layernorm_epsilon", default=1e-5),
                "rope_theta": float(args.get("rotary_base") or 1e4),
                "init_std": args.get("init_method_std", 0.02),
            }
        )
    except (ValidationError, LookupError, TypeError, ValueError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else in_words(error)
        raise CheckpointError(
            f"{where}: args describe no model that megagrow can express", found=found[:500]
        ) from None
    _require_alike(args, model, where)
    if model.vocab == padded and options.vocabulary is None and args.get("vocab_size") is None:
        name = f"args.vocab_size, unset: all {padded} rows count as tokens"
        left_out.append(LeftOut(name, "set --vocab-size to the true number"))
    elif model.vocabulary < padded:
        name = f"rows {model.vocabulary} to {padded - 1} of the token table"
        left_out.append(LeftOut(name, "padding of the vocabulary"))
    attention = args.get("attention_dropout", model.dropout)
    if attention != model.dropout:
        reason = f"megagrow has one dropout, hidden_dropout's {model.dropout}"
        left_out.append(LeftOut(f"args.attention_dropout {attention}", reason))
    return model, int(padded), left_out


def _vocabulary(args: Mapping[str, Any], padded: int, where: str, options: ReadOptions) -> int:
    known = args.get("vocab_size")
    known = known if isinstance(known, int) and 0 < known <= padded else None
    wanted = options.vocabulary
    if wanted is not None and (wanted > padded or known not in (None, wanted)):
        raise CheckpointError(
            f"{where}: --vocab-size {wanted} is not the vocabulary of this checkpoint",
            found=f"args.vocab_size {known}, args.padded_vocab_size {padded}",
            expected=f"{known}" if known else f"at most {padded}",
        )
    return wanted or known or padded


def _agreed(args: Mapping[str, Any], name: str, other: str, *, default: float) -> float:
    """An argument that has two names across Megatron versions."""
    values = [args[key] for key in (name, other) if args.get(key) is not None]
    if len(set(values)) > 1:
        raise ValueError(f"{name} is {values[0]}, {other} is {values[1]}")
    return float(values[0]) if values else default


def _require_alike(args: Mapping[str, Any], model: ModelConfig, where: str) -> None:
    """Checks that depend on the family or on another argument."""
    fused = args.get("bias_gelu_fusion", args.get("bias_activation_fusion", True))
    wanted: dict[str, tuple[Any, ...]] = {"encoder_num_layers": (None, model.layers)}
    if model.architecture.positions == "learned":
        wanted["add_position_embedding"] = (True,)
        wanted["position_embedding_type"] = ("learned_absolute",)
    else:
        # Older versions set use_rotary_position_embeddings and leave this at its default.
        wanted["position_embedding_type"] = ("rope", "learned_absolute")
    if model.architecture.activation == "gelu" and not fused:
        raise CheckpointError(
            f"{where}: args.bias_gelu_fusion: megagrow's GELU is the tanh form",
            found="False, with which Megatron computes the exact form",
            expected="True",
        )
    for key, known in wanted.items():
        if args.get(key, known[0]) not in known:
            raise CheckpointError(
                f"{where}: args.{key}: megagrow's model has no such feature",
                found=repr(args[key])[:200],
                expected=repr(known[0]),
            )


def write_args(model: ModelConfig, layout: Layout, *, padded: int) -> dict[str, Any]:
    """Megatron's arguments for a model: those that its loading compares or adopts.

    Raises:
        CheckpointError: Megatron has no such family, or no such scaling of rotary frequencies.
    """
    if not family_of(model).megatron:
        raise CheckpointError(
            f"Megatron has no model of family {model.family}, or none that megagrow knows",
            fix="convert to native, dcp or huggingface",
        )
    if model.rope_scaling is not None:
        raise CheckpointError(
            "Megatron has no argument for this scaling of rotary frequencies",
            found=f"model.rope_scaling {model.rope_scaling.model_dump(exclude_none=True)}",
            fix="convert to native, dcp or huggingface",
        )
    normalization, rotary, gated, biases = _kind(model.architecture)
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "kv_channels": model.head_dim,
        "group_query_attention": model.kv_groups != model.heads,
        "num_query_groups": model.kv_groups,
        "max_position_embeddings": model.sequence,
        "seq_length": model.sequence,
        "encoder_seq_length": model.sequence,
        "position_embedding_type": "rope" if rotary else "learned_absolute",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": rotary,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        # Megatron's own option takes only integers, its model any number.
        "rotary_base": _whole_if_it_is(model.rope_theta),
        "normalization": normalization,
        "norm_epsilon": model.norm_eps,
        "layernorm_epsilon": model.norm_eps,
        "swiglu": gated,
        "add_bias_linear": biases,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        # Megatron has only one number; the rest is in our own entry.
        **({} if model.stds.matrices is None else {"init_method_std": model.stds.matrices}),
        "make_vocab_size_divisible_by": DIVISOR,
        "padded_vocab_size": padded,
        "vocab_size": model.vocabulary,
        "tokenizer_type": None,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "use_distributed_optimizer": False,
        "use_mcore_models": True,
        "transformer_impl": "local",
    }


def _kind(made: Architecture) -> tuple[str, bool, bool, bool]:
    """What distinguishes models in Megatron: norm, rotary positions, SwiGLU, biases."""
    norm = "LayerNorm" if made.norm == "layer" else "RMSNorm"
    return norm, made.positions == "rotary", made.gated, made.biases == "all"


def _whole_if_it_is(value: float) -> float:
    return int(value) if value.is_integer() else value
