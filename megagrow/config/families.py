"""The model families that a configuration may name, and their architectural properties.

Code that builds, counts or converts a model tests these properties, never the family's name. The
rest of a family, which needs PyTorch, is its folder in `megagrow.models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture of a family's models.

    Attributes:
        norm: LayerNorm, which subtracts the mean and has a bias, or RMSNorm.
        positions: a learned embedding, or rotary (RoPE).
        gated: whether the MLP is gated, as SwiGLU is.
        biases: whether linear layers have biases.
        activation: of the MLP; `gelu` is the tanh approximation.
        check: further requirements of the family; raises ValueError with a fix.
    """

    norm: Literal["layer", "rms"]
    positions: Literal["learned", "rotary"]
    gated: bool
    biases: bool
    activation: Literal["gelu", "silu"]
    check: Callable[[Any], None] | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        norm="layer", positions="learned", gated=False, biases=True, activation="gelu"
    ),
    "llama": Architecture(
        norm="rms", positions="rotary", gated=True, biases=False, activation="silu"
    ),
}


def register_architecture(name: str, architecture: Architecture) -> None:
    """Make a family available to configurations (see `megagrow.models.registry.register`).

    Raises:
        ValueError: the name is taken.
    """
    if ARCHITECTURES.setdefault(name, architecture) != architecture:
        raise ValueError(f"there is another family {name!r}")
