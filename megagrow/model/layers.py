"""Layers whose parameters have the shapes of their logical tensors.

A weight keeps its structure as axes in memory (heads, head_dim, ...) and is
viewed as a matrix where it is used, which costs nothing.  Parameters are left
uninitialised: a state transfer fills them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x W^T + b for a weight with structured output and input axes.

    Args:
        out_axes: sizes of the output axes; the layer's output has their product as width.
        in_axes: sizes of the input axes.

    Shapes: [..., prod(in_axes)] -> [..., prod(out_axes)].
    """

    def __init__(self, out_axes: Sequence[int], in_axes: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_axes, *in_axes))
        self.bias = nn.Parameter(torch.empty(*out_axes))
        self._matrix = (math.prod(out_axes), math.prod(in_axes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return F.linear(x, self.weight.view(self._matrix), self.bias.view(-1))


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; same shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
