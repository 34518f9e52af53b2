"""The model families that a configuration may name, and their architectural properties.

Code that builds, counts or converts a model tests these properties, never the family's name. The
rest of a family, which needs PyTorch, is its folder in `megagrow.models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Norm = Literal["layer", "rms"]
Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "gelu_exact", "silu"]
Biases = Literal["all", "qkv", "none"]
BlockNorms = Literal["before", "after", "both"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture of a family's models.

    Attributes:
        norm: LayerNorm, which subtracts the mean and has a bias, or RMSNorm.
        positions: a learned embedding, or rotary (RoPE).
        gated: whether the MLP is gated, as SwiGLU is.
        biases: which linear layers have biases: all of the blocks, queries, keys and values alone,
            or none.
        activation: of the MLP; `gelu` is the tanh approximation, `gelu_exact` is not.
        block_norms: where a sub-layer has a norm: before it, after it (on its output, before that
            is added to the residual stream), or both.
        head_norm: the RMSNorm of queries and keys (QK-norm): over each head, or over all heads of a
            token at once.
        parallel: whether attention and MLP read the same residual stream, as in GPT-J; else the MLP
            reads what attention has added to.
        unit_gain: whether a norm multiplies by 1 + its parameter, as Gemma's do.
        scaled_embedding: whether embeddings are multiplied by the square root of `hidden`.
        settings: keys of the `model` section that only some families have, and this one has.
        check: further requirements of the family; raises ValueError with a fix.
    """

    norm: Norm
    positions: Positions
    gated: bool
    biases: Biases
    activation: Activation
    block_norms: BlockNorms = "before"
    head_norm: Literal["each", "all"] | None = None
    parallel: bool = False
    unit_gain: bool = False
    scaled_embedding: bool = False
    settings: frozenset[str] = frozenset()
    check: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        known = {
            "norm": Norm,
            "positions": Positions,
            "activation": Activation,
            "biases": Biases,
            "block_norms": BlockNorms,
        }
        for field, values in known.items():
            if getattr(self, field) not in get_args(values):
                raise ValueError(
                    f"{field} {getattr(self, field)!r:.40} of an architecture: expected one of "
                    f"{', '.join(get_args(values))}"
                )

    @property
    def plain(self) -> bool:
        """Whether its models are plain pre-norm transformers, as GPT-2 and LLaMA are."""
        return (
            self.block_norms == "before"
            and self.head_norm is None
            and not (self.parallel or self.unit_gain or self.scaled_embedding)
        )


_ROPE = frozenset({"rope_scaling"})
_WINDOW = frozenset({"window", "full_every"})
_LLAMA = Architecture(
    norm="rms",
    positions="rotary",
    gated=True,
    biases="none",
    activation="silu",
    settings=_ROPE,
)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        norm="layer", positions="learned", gated=False, biases="all", activation="gelu"
    ),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, settings=_ROPE | {"window"}),
    "qwen2": replace(_LLAMA, biases="qkv"),
    "qwen3": replace(_LLAMA, head_norm="each", settings=_ROPE | {"head_norm_eps"}),
    "olmo2": replace(
        _LLAMA, head_norm="all", block_norms="after", settings=_ROPE | {"head_norm_eps"}
    ),
    "smollm3": replace(_LLAMA, settings=_ROPE | {"no_rope_every"}),
    "phi3": replace(_LLAMA, settings=_ROPE | {"window", "rope_fraction"}),
    "gpt_neox": Architecture(
        norm="layer",
        positions="rotary",
        gated=False,
        biases="all",
        activation="gelu_exact",
        parallel=True,
        settings=_ROPE | {"rope_fraction"},
    ),
    "gemma2": replace(
        _LLAMA,
        activation="gelu",
        block_norms="both",
        unit_gain=True,
        scaled_embedding=True,
        settings=_ROPE | _WINDOW | {"attention_scale", "attention_softcap", "logit_softcap"},
    ),
}


def register_architecture(name: str, architecture: Architecture) -> None:
    """Make a family available to configurations (see `megagrow.models.registry.register`).

    Raises:
        ValueError: the name is taken.
    """
    if ARCHITECTURES.setdefault(name, architecture) != architecture:
        raise ValueError(f"there is another family {name!r}")
