"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864).

Feature i of a head's first half forms a pair with feature i of the second half, as
Hugging Face's LLaMA pairs them; position p rotates pair i by the angle p * theta^(-2i/D), D being
the number of rotated features, a head's first ones. With a scaling the frequencies theta^(-2i/D)
are changed (`megagrow.config.model.RopeScaling`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from megagrow import ops
from megagrow.config import ModelConfig


@dataclass(frozen=True)
class Rotary:
    """The frequencies of a model's rotary positions.

    Attributes:
        theta: the base.
        dim: number of features that are rotated, a head's first ones.
        scaling: (kind, factor, low_freq_factor, high_freq_factor, original sequence); None: none.
    """

    theta: float
    dim: int
    scaling: tuple[str, float, float, float, int] | None = None

    @staticmethod
    def of(model: ModelConfig) -> Rotary:
        """Those of a model."""
        given, scaling = model.rope_scaling, None
        if given is not None:
            scaling = (
                given.type,
                given.factor,
                given.low_freq_factor or 0.0,
                given.high_freq_factor or 0.0,
                given.original_sequence or 0,
            )
        return Rotary(model.rope_theta, model.rope_dim, scaling)

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """Angle per position of every pair, [dim / 2], fp64."""
        pair = torch.arange(self.dim // 2, dtype=torch.float64, device=device)
        plain = self.theta ** (-2.0 * pair / self.dim)
        if self.scaling is None:
            return plain
        kind, factor, low, high, original = self.scaling
        if kind == "linear":
            return plain / factor
        # llama3: by the number of turns that a pair makes over the original sequence.
        turns = original * plain / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return plain * (smooth + (1 - smooth) / factor)


def rotate_packed_(
    x: torch.Tensor, rotary: Rotary, *, turned: int, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate the first `turned` heads of each group [B, S, G, heads, D] in place, in one kernel.

    All features of a head are rotated: `rotary.dim` is D. Positions are [B, S]; by default tokens
    are counted from the first one.
    """
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = _kept_table(x.shape[1], rotary, high, x.device)
    if positions is None:
        return ops.rotary_(x, cos, sin, turned)
    cos, sin = (table[positions.view(-1)] for table in (cos, sin))
    return ops.rotary_(x.flatten(0, 1).unsqueeze(0), cos, sin, turned).view_as(x)


def rotate(x: torch.Tensor, rotary: Rotary, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Rotate every head by its position: [B, S, ..., D] -> the same shape, contiguous.

    Positions are [B, S]; by default tokens are counted from the first one.
    """
    # torch.compile traces the computation and cannot use a cache.
    table = rotary_table if torch.compiler.is_compiling() else _kept_table
    cos, sin = table(x.shape[1], rotary, x.dtype, x.device)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    shape = (*cos.shape[:-1], *(1 for _ in x.shape[2:-1]), rotary.dim // 2)
    cos, sin = cos.view(shape), sin.view(shape)
    if rotary.dim == x.shape[-1]:
        return _Rotate.apply(x, cos, sin)
    turned = _Rotate.apply(x[..., : rotary.dim], cos, sin)
    return torch.cat((turned, x[..., rotary.dim :]), dim=-1)


def rotary_table(
    sequence: int, rotary: Rotary, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [S, dim / 2] of all angles, rounded from fp64."""
    position = torch.arange(sequence, dtype=torch.float64, device=device)
    angle = torch.outer(position, rotary.frequencies(device))
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=32)
def _kept_table(
    sequence: int, rotary: Rotary, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # A table that is created in inference mode may be used in training later.
    with torch.inference_mode(False):
        return rotary_table(sequence, rotary, dtype, device)


class _Rotate(torch.autograd.Function):
    """Forward: rotate by the angles. Backward: rotate back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float
) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    first = torch.addcmul(a * cos, b, sin, value=-direction)
    second = torch.addcmul(b * cos, a, sin, value=direction)
    return torch.cat((first, second), dim=-1)
