"""The families of models that a configuration may name, and what tells their models apart.

Whoever builds, counts or converts a model asks these properties, never the family's name.  The
rest of a family, which needs PyTorch, is its folder in `megagrow.models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the models of a family are made.

    Attributes:
        norm: LayerNorm, which takes the mean off and has a bias, or RMSNorm.
        positions: a learned table, or turned queries and keys.
        gated: whether the MLP is a product of two maps, one of them through the activation.
        biases: whether linear layers have biases.
        activation: of the MLP; `gelu` is its tanh form.
        check: what a model of the family needs besides; it raises ValueError with a fix.
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
    """Let configurations name a family (see `megagrow.models.registry.register`).

    Raises:
        ValueError: there is another of that name.
    """
    if ARCHITECTURES.setdefault(name, architecture) != architecture:
        raise ValueError(f"there is another family {name!r}")
