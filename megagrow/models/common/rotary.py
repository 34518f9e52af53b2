"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864).

Feature i of a head's first half forms a pair with feature i of the second half, as
Hugging Face's LLaMA pairs them; position p rotates pair i by the angle p * theta^(-2i/D).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from megagrow import ops


def rotate_packed_(x: torch.Tensor, theta: float, *, turned: int) -> torch.Tensor:
    """Rotate the first `turned` heads of each group [B, S, G, heads, D] in place, in one kernel."""
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = _kept_table(x.shape[1], x.shape[-1], theta, high, x.device)
    return ops.rotary_(x, cos, sin, turned)


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate every head by its position: [B, S, ..., D] -> the same shape, contiguous."""
    # torch.compile traces the computation and cannot use a cache.
    table = rotary_table if torch.compiler.is_compiling() else _kept_table
    cos, sin = table(x.shape[1], x.shape[-1], theta, x.dtype, x.device)
    shape = (x.shape[1], *(1 for _ in x.shape[2:-1]), x.shape[-1] // 2)
    return _Rotate.apply(x, cos.view(shape), sin.view(shape))


def rotary_table(
    sequence: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [S, D/2] of all angles, rounded from fp64."""
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    position = torch.arange(sequence, dtype=torch.float64, device=device)
    angle = torch.outer(position, theta ** (-2.0 * pair / head_dim))
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=32)
def _kept_table(
    sequence: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # A table that is created in inference mode may be used in training later.
    with torch.inference_mode(False):
        return rotary_table(sequence, head_dim, theta, dtype, device)


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
