# ruff: noqa: D103 - each function is described next to its schema, in schemas.py
"""Reference implementations of all ops in plain PyTorch: the fallback, also used in tests.

Signatures match the schemas. Arithmetic is in fp32, or in fp64 for fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megagrow.ops.schemas import statistics_dtype

# Logits converted to fp32 at a time: few enough to stay in a core's cache, or enough to fill a GPU.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}
_ALPHA, _CUBIC = math.sqrt(2.0 / math.pi), 0.044715  # of GELU's tanh form


def _up(x: Tensor) -> Tensor:
    return x.to(statistics_dtype(x))


def _sum(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tensor to normalise, and the op's corresponding output."""
    if residual is None:
        return x, x.new_empty(0)
    z = x + residual
    return z, z


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    z, returned = _sum(x, residual)
    high = _up(z)
    rstd = (high.square().mean(-1) + eps).rsqrt()
    return (high * rstd.unsqueeze(-1) * _up(weight)).to(x.dtype), returned, rstd


def rms_norm_backward(
    dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dw, _ = _norm_backward(dy, dz, z, weight, None, rstd)
    return dx, dw


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, returned = _sum(x, residual)
    high = _up(z)
    mean = high.mean(-1)
    centred = high - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd.unsqueeze(-1) * _up(weight) + _up(bias)
    return y.to(x.dtype), returned, mean, rstd


def layer_norm_backward(
    dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_backward(dy, dz, z, weight, mean, rstd)


def _norm_backward(
    dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    high, grad = _up(z), _up(dy)
    if mean is not None:
        high = high - mean.unsqueeze(-1)
    h = high * rstd.unsqueeze(-1)
    g = grad * _up(weight)
    inner = g - h * (g * h).mean(-1, keepdim=True)
    if mean is not None:
        inner = inner - g.mean(-1, keepdim=True)
    dx = inner * rstd.unsqueeze(-1)
    if dz is not None:
        dx = dx + _up(dz)
    rows = tuple(range(z.dim() - 1))
    dw, db = (grad * h, grad) if not rows else ((grad * h).sum(rows), grad.sum(rows))
    return dx.to(z.dtype), dw.to(weight.dtype), db.to(weight.dtype)


def swiglu(x: Tensor) -> Tensor:
    gate, up = _up(x).chunk(2, -1)
    return (gate * gate.sigmoid() * up).to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate, up = _up(x).chunk(2, -1)
    s, d = gate.sigmoid(), _up(grad)
    return torch.cat((d * up * s * (1 + gate * (1 - s)), d * gate * s), -1).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    a = _up(x) + _up(bias)
    return (0.5 * a * (1 + (_ALPHA * (a + _CUBIC * a**3)).tanh())).to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    a = _up(x) + _up(bias)
    t = (_ALPHA * (a + _CUBIC * a**3)).tanh()
    slope = 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * _ALPHA * (1 + 3 * _CUBIC * a * a)
    dx = _up(grad) * slope
    return dx.to(x.dtype), dx.flatten(0, -2).sum(0).to(bias.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, turned: int, back: bool) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    rotary_(result, cos, sin, turned, back)
    return result


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, turned: int, back: bool) -> None:
    a, b = _up(x[..., :turned, :]).chunk(2, -1)
    shape = (x.shape[1], 1, 1, x.shape[-1] // 2)
    c, s = cos.view(shape), (-sin if back else sin).view(shape)
    x[..., :turned, :] = torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)


def softmax_stats(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    rows, width = logits.shape
    stats = logits.new_zeros((3, rows), dtype=statistics_dtype(logits))
    top, total, target = stats
    top.fill_(-torch.inf)
    for chunk in _chunks(logits):
        top[chunk] = logits[chunk].amax(-1)
        # A row of -inf alone has no exponentials.
        base = top[chunk].masked_fill(top[chunk] == -torch.inf, 0.0).unsqueeze(1)
        total[chunk] = (logits[chunk] - base).exp_().sum(-1)
    if width:
        ours = (labels >= start) & (labels < start + width)
        index = (labels - start).masked_fill_(~ours, 0).unsqueeze(1)
        target.copy_(logits.gather(1, index).squeeze(1)).masked_fill_(~ours, 0.0)
    return stats


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int
) -> Tensor:
    result = torch.empty_like(logits)
    _cross_entropy_gradient(grad, logits, labels, stats, start, result)
    return result


def cross_entropy_backward_(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int
) -> None:
    _cross_entropy_gradient(grad, logits, labels, stats, start, logits)


def _cross_entropy_gradient(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int, into: Tensor
) -> None:
    ours = (labels >= start) & (labels < start + logits.shape[1])
    index = (labels - start).masked_fill_(~ours, 0).unsqueeze(1)
    at_target = grad.neg().masked_fill_(~ours, 0.0).unsqueeze(1)
    top, total, _ = stats
    scale, top = (grad / total).unsqueeze(1), top.unsqueeze(1)
    for chunk in _chunks(logits):
        # grad * (softmax - 1 at the target)
        p = (logits[chunk] - top[chunk]).exp_().mul_(scale[chunk])
        into[chunk] = p.scatter_add_(1, index[chunk], at_target[chunk])


def _chunks(logits: Tensor) -> list[slice]:
    rows, width = logits.shape
    if width == 0:
        return []
    size = max(1, _CHUNK.get(logits.device.type, _CHUNK["cuda"]) // width)
    return [slice(at, at + size) for at in range(0, rows, size)]


def adamw_(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, low: Tensor | None,
    scale: Tensor | None, young: Tensor | None, rates: Tensor | None, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    old = (lr, lr / (1 - beta1**step), math.sqrt(1 - beta2**step))
    flat = parameter.view(-1)
    rate, step_size, root = (torch.full_like(flat, value) for value in old)
    if young is not None and rates is not None:
        for row, values in zip(young.tolist(), rates.tolist(), strict=True):
            mask = _young_mask(row).to(flat.device)
            for whole, value in zip((rate, step_size, root), values, strict=True):
                whole[row[0] : row[0] + row[1]].masked_fill_(mask, value)
    grad = gradient.view(-1).float()
    if scale is not None:
        grad = grad * scale
    m, v = exp_avg.view(-1), exp_avg_sq.view(-1)
    flat.mul_(1 - rate * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    flat.sub_(step_size * m / (v.sqrt() / root + eps))
    if low is not None:
        low.view(-1).copy_(flat)


def _young_mask(row: Sequence[int]) -> Tensor:
    """A flat mask of the young elements of a box of the table."""
    size, begin, step, count = (row[k : k + 4] for k in (2, 6, 10, 14))
    old = torch.ones(size, dtype=torch.bool)
    for axis in range(4):
        kept = torch.zeros(size[axis], dtype=torch.bool)
        kept[begin[axis] : begin[axis] + step[axis] * count[axis] : step[axis]] = True
        shape = [1] * 4
        shape[axis] = size[axis]
        old &= kept.view(shape)
    return ~old.view(-1)


def copy_boxes_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], low: Sequence[Tensor],
    scales: Sequence[float],
) -> None:  # fmt: skip
    for k, (target, source, scale) in enumerate(zip(targets, sources, scales, strict=True)):
        if scale == 1.0:
            target.copy_(source)
        else:
            torch.mul(source, scale, out=target)
        if low:
            low[k].copy_(target)


REFERENCES: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "layer_norm": layer_norm,
    "layer_norm_backward": layer_norm_backward,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "bias_gelu": bias_gelu,
    "bias_gelu_backward": bias_gelu_backward,
    "rotary": rotary,
    "rotary_": rotary_,
    "softmax_stats": softmax_stats,
    "cross_entropy_backward": cross_entropy_backward,
    "cross_entropy_backward_": cross_entropy_backward_,
    "adamw_": adamw_,
    "copy_boxes_": copy_boxes_,
}
