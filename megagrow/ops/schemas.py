"""The schemas of the ops, and their fake kernels (output shapes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# x [..., n]; with a residual z = x + residual, else z is empty.  rstd and mean are [...], fp32.
SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor? residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor z, Tensor rstd)",
    "rms_norm_backward": "(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor rstd)"
    " -> (Tensor dx, Tensor dweight)",
    "layer_norm": "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    "layer_norm_backward": "(Tensor dy, Tensor? dz, Tensor z, Tensor weight, Tensor mean,"
    " Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    # x [..., 2 n]: gates, then values -> [..., n]
    "swiglu": "(Tensor x) -> Tensor",
    "swiglu_backward": "(Tensor grad, Tensor x) -> Tensor",
    # GELU (tanh form) of x [..., n] + bias [n]
    "bias_gelu": "(Tensor x, Tensor bias) -> Tensor",
    "bias_gelu_backward": "(Tensor grad, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    # x [batch, sequence, groups, heads, width]: rotates the first `turned` heads of each group
    "rotary": "(Tensor x, Tensor cos, Tensor sin, int turned, bool back) -> Tensor",
    "rotary_": "(Tensor(a!) x, Tensor cos, Tensor sin, int turned, bool back) -> ()",
    # logits [rows, columns], the part of the vocabulary from `start` on; labels [rows]; stats [3,
    # rows]: the largest logit, the sum of exp(logit - largest), the logit at the label or 0
    "softmax_stats": "(Tensor logits, Tensor labels, int start) -> Tensor",
    "cross_entropy_backward": "(Tensor grad, Tensor logits, Tensor labels, Tensor stats, int start)"
    " -> Tensor",
    "cross_entropy_backward_": "(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor stats,"
    " int start) -> ()",
    # flat tensors; see megagrow/ops/adamw.py
    "adamw_": "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? low, Tensor? scale, Tensor? young, Tensor? rates, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, int step) -> ()",
    # targets[k] = sources[k] * scales[k]; low is empty, or of equal length and receives the same
    # values
    "copy_boxes_": "(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] low, float[] scales)"
    " -> ()",
}


def define(namespace: str) -> torch.library.Library:
    """Define all ops in a namespace; they exist as long as the returned library."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    return library


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a tensor's statistics: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(0) if residual is None else torch.empty_like(x)


def _nothing(*_: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, residual, weight, eps: (
        torch.empty_like(x), _sum(x, residual), _rows(x)
    ),
    "rms_norm_backward": lambda dy, dz, z, weight, rstd: (
        torch.empty_like(z), torch.empty_like(weight)
    ),
    "layer_norm": lambda x, residual, weight, bias, eps: (
        torch.empty_like(x), _sum(x, residual), _rows(x), _rows(x)
    ),
    "layer_norm_backward": lambda dy, dz, z, weight, mean, rstd: (
        torch.empty_like(z), torch.empty_like(weight), torch.empty_like(weight)
    ),
    "swiglu": lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    "swiglu_backward": lambda grad, x: torch.empty_like(x),
    "bias_gelu": lambda x, bias: torch.empty_like(x),
    "bias_gelu_backward": lambda grad, x, bias: (torch.empty_like(x), torch.empty_like(bias)),
    "rotary": lambda x, cos, sin, turned, back: torch.empty_like(x),
    "rotary_": _nothing,
    "softmax_stats": lambda logits, labels, start: logits.new_empty(
        (3, logits.shape[0]), dtype=statistics_dtype(logits)
    ),
    "cross_entropy_backward": lambda grad, logits, labels, stats, start: torch.empty_like(logits),
    "cross_entropy_backward_": _nothing,
    "adamw_": _nothing,
    "copy_boxes_": _nothing,
}  # fmt: skip
