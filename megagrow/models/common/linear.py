"""The matrix product of all layers, including tensor-parallel communication."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megagrow.models.common.parallel import (
    SEQUENCE,
    SERIAL,
    TensorParallel,
    all_gather,
    reduce_scatter,
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    rows: int,
    parallel: TensorParallel = SERIAL,
) -> torch.Tensor:
    """The product of x [..., I] with the first `rows` rows of a weight, as a matrix [R, I].

    With more than one rank it enters the tensor-parallel region: x is either the same on all ranks
    or a part of the sequence, which is gathered; the gradient of x is reduced over the ranks while
    that of the weight is computed.
    """
    return _Linear.apply(x, weight, bias, rows, parallel)


class _Linear(torch.autograd.Function):
    """Saves x before the gather, and the parameter itself instead of a view of it.

    So the gathered sequence is not kept until the backward pass, and ZeRO-3 can free the whole
    parameter in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: int,
        parallel: TensorParallel,
    ) -> torch.Tensor:
        # Only the gradient of the weight needs x.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.rows, ctx.parallel, ctx.width = rows, parallel, x.shape[-1]
        ctx.bias_shape = None if bias is None else bias.shape
        if parallel.splits_sequence:
            x = all_gather(x, parallel, SEQUENCE)
        flat = x.flatten(0, -2)
        matrix = _matrix(weight, x.shape[-1], rows).t()
        y = flat @ matrix if bias is None else torch.addmm(bias.view(-1), flat, matrix)
        return y.view(*x.shape[:-1], rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        parallel, width = ctx.parallel, ctx.width
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        if needs_weight and parallel.splits_sequence:
            x = all_gather(x, parallel, SEQUENCE)
        grad_x = grad_weight = grad_bias = work = None
        if needs_x:
            grad_x = (flat @ _matrix(weight, width, ctx.rows)).view(*grad.shape[:-1], width)
            if parallel.splits_sequence:
                grad_x, work = reduce_scatter(grad_x, parallel, SEQUENCE, wait=False)
            elif parallel.size > 1:
                work = dist.all_reduce(grad_x, group=parallel.group, async_op=True)
        if needs_weight:
            grad_weight = _gradient(flat.t(), x.flatten(0, -2), weight)
        if needs_bias:
            grad_bias = flat.sum(0).view(ctx.bias_shape)
        if work is not None:
            work.wait()
        return grad_x, grad_weight, grad_bias, None, None


def _matrix(weight: torch.Tensor, width: int, rows: int) -> torch.Tensor:
    return weight.view(-1, width)[:rows]


def _gradient(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in the weight's shape, padded with zero rows."""
    if left.shape[0] * right.shape[1] == weight.numel():
        return (left @ right).view(weight.shape)
    padded = weight.new_zeros(weight.shape)
    torch.mm(left, right, out=_matrix(padded, right.shape[1], left.shape[0]))
    return padded
