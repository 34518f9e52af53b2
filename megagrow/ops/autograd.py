"""The gradients of the ops; each backward pass is an op of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagrow.ops.library import NAMESPACE, _library

_ops = getattr(torch.ops, NAMESPACE)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, *_ = inputs
    _, z, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(z if ctx.has_residual else x, weight, *statistics)


def _rms_norm(ctx: Any, dy: Tensor, dz: Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dw = _ops.rms_norm_backward(dy.contiguous(), _gradient_of_sum(ctx, dz), *ctx.saved_tensors)
    return dx, dx if ctx.has_residual else None, dw, None


def _layer_norm(ctx: Any, dy: Tensor, dz: Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dw, db = _ops.layer_norm_backward(
        dy.contiguous(), _gradient_of_sum(ctx, dz), *ctx.saved_tensors
    )
    return dx, dx if ctx.has_residual else None, dw, db, None


def _gradient_of_sum(ctx: Any, dz: Tensor) -> Tensor | None:
    return dz.contiguous() if ctx.has_residual else None


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu(ctx: Any, grad: Tensor) -> Tensor:
    return _ops.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


def _bias_gelu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _ops.bias_gelu_backward(grad.contiguous(), *ctx.saved_tensors)


def _rotary_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.turned, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rotary(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    turned = _ops.rotary(grad.contiguous(), cos, sin, ctx.turned, not ctx.back)
    return turned, None, None, None, None


for _name, _backward, _context in (
    ("rms_norm", _rms_norm, _norm_context),
    ("layer_norm", _layer_norm, _norm_context),
    ("swiglu", _swiglu, _keep_inputs),
    ("bias_gelu", _bias_gelu, _keep_inputs),
    ("rotary", _rotary, _rotary_context),
):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _backward, setup_context=_context, lib=_library
    )


class RotaryInPlace(torch.autograd.Function):
    """`rotary_`: overwrites and returns its input; the backward pass rotates back.

    Returns a view, since autograd does not allow in-place changes of a tensor that may be a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
        """Rotate."""
        ctx.save_for_backward(cos, sin)
        ctx.turned = turned
        _ops.rotary_(x.detach(), cos, sin, turned, False)
        torch.autograd.graph.increment_version(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Rotate back."""
        cos, sin = ctx.saved_tensors
        # A gradient may be shared, so it is not overwritten.
        return _ops.rotary(grad.contiguous(), cos, sin, ctx.turned, True), None, None, None
