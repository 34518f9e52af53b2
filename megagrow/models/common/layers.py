"""Layers whose parameters are a rank's tensor-parallel shards of the logical tensors.

A weight keeps its structure as axes in memory (heads, head_dim, ...) and is viewed as a matrix in
use, which is free. Parameters are left uninitialised: a state transfer fills them.

Shapes: B batch, S sequence, s a rank's part of the sequence with sequence parallelism, else S; T
the number of tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from megagrow import ops
from megagrow.models.common.linear import linear
from megagrow.models.common.parallel import (
    SERIAL,
    TensorParallel,
    copy_to_tensor_parallel_region,
    random_numbers_of_this_rank,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megagrow.state.layout import even_split


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the weight split on one of its output axes.

    Args:
        out_axes: this rank's sizes of the output axes; the output's width is their product.
        in_axes: sizes of the input axes.
        bias: whether there is one.
        gelu: whether GELU (the tanh approximation, as in GPT-2) follows.
        parallel: the ranks that hold the other parts.

    Shapes: [B, s, prod(in_axes)] -> [B, S, prod(out_axes)], this rank's units.
    """

    def __init__(
        self,
        out_axes: Sequence[int],
        in_axes: Sequence[int],
        *,
        bias: bool,
        gelu: bool = False,
        parallel: TensorParallel = SERIAL,
    ) -> None:
        super().__init__()
        self._gelu = gelu
        self.weight = nn.Parameter(torch.empty(*out_axes, *in_axes))
        self.bias = nn.Parameter(torch.empty(*out_axes)) if bias else None
        self._rows, self._parallel = math.prod(out_axes), parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        # Here and not in the owning module: ZeRO-3 has the bias gathered only while this layer
        # runs.
        if self._gelu and self.bias is not None and ops.own("bias_gelu", x):
            y = linear(x, self.weight, None, rows=self._rows, parallel=self._parallel)
            return ops.bias_gelu(y, self.bias)
        y = linear(x, self.weight, self.bias, rows=self._rows, parallel=self._parallel)
        return F.gelu(y, approximate="tanh") if self._gelu else y


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the weight split on one of its input axes.

    The bias is replicated and added once, after the reduction.

    Args:
        out_axes: sizes of the output axes.
        in_axes: this rank's sizes of the input axes.
        bias: whether there is one.
        parallel: the ranks that hold the other parts.

    Shapes: [B, S, prod(in_axes)], this rank's units -> [B, s, prod(out_axes)].
    """

    def __init__(
        self,
        out_axes: Sequence[int],
        in_axes: Sequence[int],
        *,
        bias: bool,
        parallel: TensorParallel = SERIAL,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_axes, *in_axes))
        self.bias = nn.Parameter(torch.empty(*out_axes)) if bias else None
        self._rows, self._parallel = math.prod(out_axes), parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        if self._parallel.size == 1:
            return linear(x, self.weight, self.bias, rows=self._rows)
        y = _sum_over_ranks(linear(x, self.weight, None, rows=self._rows), self._parallel)
        if self.bias is None:
            return y
        return y + replicated(self.bias, self._parallel).view(-1)


class VocabParallelEmbedding(nn.Module):
    """Embedding lookup with the table split on the vocabulary.

    All ranks hold ceil(vocabulary / T) rows; the last ones may end with padding, which is never
    used.

    Shapes: [B, S] token ids -> [B, s, width].
    """

    def __init__(self, vocabulary: int, width: int, *, parallel: TensorParallel = SERIAL) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(-(-vocabulary // parallel.size), width))
        self._start, self._stop = even_split(vocabulary, parallel.size, parallel.rank)
        self._parallel = parallel

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up."""
        if self._parallel.size == 1:
            return F.embedding(tokens, self.token)
        foreign = (tokens < self._start) | (tokens >= self._stop)
        rows = (tokens - self._start).masked_fill(foreign, 0)
        x = F.embedding(rows, self.token).masked_fill(foreign.unsqueeze(-1), 0.0)
        return _sum_over_ranks(x, self._parallel)


class VocabParallelOutput(nn.Module):
    """The output head: logits of this rank's part of the vocabulary, without padding.

    Args:
        vocabulary: its size.
        width: of the input.
        name: name of its parameter, [ceil(vocabulary / T), width] on every rank.
        parallel: the ranks that hold the other parts.

    Shapes: [B, s, width] -> [B, S, rows], rows <= ceil(vocabulary / T).
    """

    def __init__(
        self, vocabulary: int, width: int, *, name: str, parallel: TensorParallel = SERIAL
    ) -> None:
        super().__init__()
        weight = nn.Parameter(torch.empty(-(-vocabulary // parallel.size), width))
        self.register_parameter(name, weight)
        start, stop = even_split(vocabulary, parallel.size, parallel.rank)
        self._name, self._rows, self._parallel = name, stop - start, parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the head."""
        weight = getattr(self, self._name)
        return linear(x, weight, None, rows=self._rows, parallel=self._parallel)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, [B, s, width]."""

    def __init__(self, width: int, eps: float, *, parallel: TensorParallel = SERIAL) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps, self._parallel = eps, parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; same shape.  Statistics of lower precisions are taken in fp32."""
        return ops.layer_norm(x, *self._parameters_here(), self.eps)

    def _parameters_here(self) -> tuple[torch.Tensor, torch.Tensor]:
        return replicated(self.weight, self._parallel), replicated(self.bias, self._parallel)


class AddLayerNorm(LayerNorm):
    """(LayerNorm of x + residual, x + residual), each [B, s, width]."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and normalise."""
        return ops.add_layer_norm(x, residual, *self._parameters_here(), self.eps)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        width: length of the axis.
        eps: added to the mean square.
        unit: whether the gain is 1 + the parameter, as in Gemma (arXiv 2403.08295).
        parallel: the ranks of the tensor-parallel group.
    """

    def __init__(
        self, width: int, eps: float, *, unit: bool = False, parallel: TensorParallel = SERIAL
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.unit, self._parallel = eps, unit, parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; same shape.  The mean of lower precisions is taken in fp32."""
        return ops.rms_norm(x, self._gain_here(), self.eps)

    def _gain_here(self) -> torch.Tensor:
        weight = replicated(self.weight, self._parallel)
        return weight + 1.0 if self.unit else weight


class AddRMSNorm(RMSNorm):
    """(RMSNorm of x + residual, x + residual), each [B, s, width]."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and normalise."""
        return ops.add_rms_norm(x, residual, self._gain_here(), self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of every query, or of every key, over its features; all heads share one gain.

    Args:
        axes: this rank's sizes of the axes of heads and, last, features.
        eps: as in RMSNorm.
        parallel: the ranks that hold the other heads.

    Shapes: [B, S, *axes] with further axes of size 1 -> the same shape.
    """

    def __init__(
        self, axes: Sequence[int], eps: float, *, parallel: TensorParallel = SERIAL
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(axes[-1]))
        self.eps, self._parallel = eps, parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; the mean of lower precisions is taken in fp32."""
        # Every rank has a part of the gradient, that of its heads.
        return ops.rms_norm(
            x, copy_to_tensor_parallel_region(self.weight, self._parallel), self.eps
        )


class AllHeadsNorm(nn.Module):
    """RMSNorm of the queries, or the keys, of a token over all heads; a gain for every feature.

    Args:
        axes: this rank's sizes of the axes of heads and, last, features.
        eps: as in RMSNorm.
        parallel: the ranks that hold the other heads, over which the mean is taken too.

    Shapes: [B, S, G, n, D] -> the same shape.
    """

    def __init__(
        self, axes: Sequence[int], eps: float, *, parallel: TensorParallel = SERIAL
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*axes))
        self.eps, self._parallel = eps, parallel
        self._features = math.prod(axes) * parallel.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; the mean of lower precisions is taken in fp32."""
        wide = x if x.dtype == torch.float64 else x.float()
        total = wide.square().sum((-3, -2, -1), keepdim=True)
        # The sum is used by every rank, so its gradient is summed over them as well.
        total = reduce_from_tensor_parallel_region(total, self._parallel)
        total = copy_to_tensor_parallel_region(total, self._parallel)
        y = wide * torch.rsqrt(total / self._features + self.eps)
        return y.to(x.dtype) * self.weight.view(x.shape[-3:])


class Dropout(nn.Module):
    """Dropout of the residual stream: the same mask on all ranks, or one per sequence part."""

    def __init__(self, p: float, *, parallel: TensorParallel = SERIAL) -> None:
        super().__init__()
        self.p, self._own = p, parallel if parallel.splits_sequence else SERIAL

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply while training; same shape."""
        if self.p == 0.0 or not self.training:
            return x
        with random_numbers_of_this_rank(self._own, x.device):
            return F.dropout(x, self.p)


def _sum_over_ranks(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Leave the tensor-parallel region."""
    if parallel.sequence:
        return reduce_scatter_to_sequence_parallel_region(x, parallel)
    return reduce_from_tensor_parallel_region(x, parallel)


def replicated(parameter: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """A parameter used outside the tensor-parallel region, where the sequence may be split."""
    return copy_to_tensor_parallel_region(parameter, parallel) if parallel.sequence else parameter
