"""The model families that a configuration may name, and their architectural properties.

Code that builds, counts or converts a model tests these properties, never the family's name. The
rest of a family, which needs PyTorch, is its folder in `megagrow.models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Norm = Literal["layer", "rms"]
Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "silu"]


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

    norm: Norm
    positions: Positions
    gated: bool
    biases: bool
    activation: Activation
    check: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        known = {"norm": Norm, "positions": Positions, "activation": Activation}
        for field, values in known.items():
            if getattr(self, field) not in get_args(values):
                raise ValueError(
                    f"{field} {getattr(self, field)!r:.40} of an architecture: expected one of "
                    f"{', '.join(get_args(values))}"
                )


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
