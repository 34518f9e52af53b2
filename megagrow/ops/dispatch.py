"""One function per op: megagrow's kernel, a selected library, or PyTorch's own op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.ops import references
from megagrow.ops.autograd import RotaryInPlace
from megagrow.ops.library import own
from megagrow.ops.third_party import alternative

BOX_AXES = 4  # of a box in `copy_boxes_`, after contiguous axes are merged

_ops = torch.ops.megagrow


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis (Zhang & Sennrich, arXiv 1910.07467); same shape."""
    other = alternative("rms_norm", x)
    if other is not None:
        return other(x, weight, eps)
    if own("rms_norm", x) and weight.dtype == x.dtype:
        return _ops.rms_norm(x.contiguous(), None, weight, eps)[0]
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual)."""
    if _fuses("rms_norm", x, residual, weight):
        return _ops.rms_norm(x.contiguous(), residual.contiguous(), weight, eps)[:2]
    z = residual + x
    return rms_norm(z, weight, eps), z


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis; same shape."""
    other = alternative("layer_norm", x)
    if other is not None:
        return other(x, weight, bias, eps)
    if own("layer_norm", x) and weight.dtype == x.dtype:
        return _ops.layer_norm(x.contiguous(), None, weight, bias, eps)[0]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of x + residual, x + residual)."""
    if _fuses("layer_norm", x, residual, weight):
        return _ops.layer_norm(x.contiguous(), residual.contiguous(), weight, bias, eps)[:2]
    z = residual + x
    return layer_norm(z, weight, bias, eps), z


def _fuses(op: str, x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether megagrow's kernel adds the residual and normalises in one pass."""
    same = weight.dtype == residual.dtype == x.dtype
    return same and own(op, x) and alternative(op, x) is None


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up for x [..., 2 n], gates first on the last axis -> [..., n]."""
    gate, up = x.chunk(2, dim=-1)
    other = alternative("swiglu", x)
    if other is not None:
        return other(gate, up)
    return _ops.swiglu(x.contiguous()) if own("swiglu", x) else F.silu(gate) * up


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh approximation, as in GPT-2) of x [..., n] + bias [n]."""
    if own("bias_gelu", x) and bias.dtype == x.dtype:
        return _ops.bias_gelu(x.contiguous(), bias)
    return F.gelu(x + bias, approximate="tanh")


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """Rotate heads by their positions in place (see `megagrow.models.common.rotary` for the pairs).

    Args:
        x: [B, S, G, heads, D] contiguous; overwritten, so nothing else may use it.
        cos: [S, D / 2], fp32 (fp64 for fp64).
        sin: likewise.
        turned: number of heads of each group to rotate, from the first on.

    Returns:
        x after the rotation, for autograd.
    """
    return RotaryInPlace.apply(x, cos, sin, turned)


def softmax_stats(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    """The statistics of one rank's logits for the cross entropy, before they are combined.

    Args:
        logits: [rows, columns], the part of the vocabulary from `start` on; columns may be 0.
        labels: [rows] token ids.
        start: token id of the first column.

    Returns:
        [3, rows] in fp32 (fp64 for fp64): the largest logit (-inf without columns), the sum of
        exp(logit - largest), and the logit at the label, or 0 if it is on another rank.
    """
    if own("cross_entropy", logits):
        return _ops.softmax_stats(logits.contiguous(), labels.contiguous(), start)
    return references.softmax_stats(logits, labels, start)


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int, *, in_place: bool
) -> Tensor:
    """Grad * (softmax - 1 at the label), [rows, columns].

    Args:
        grad: [rows], gradients of the losses, in the dtype of `stats`.
        logits: as for `softmax_stats`.
        labels: likewise.
        stats: of whole rows, combined over the ranks.
        start: as for `softmax_stats`.
        in_place: whether megagrow's kernel may overwrite contiguous logits and return them.
    """
    if not own("cross_entropy", logits):
        return references.cross_entropy_backward(grad, logits, labels, stats, start)
    grad, stats, labels = grad.contiguous(), stats.contiguous(), labels.contiguous()
    if not (in_place and logits.is_contiguous()):
        return _ops.cross_entropy_backward(grad, logits.contiguous(), labels, stats, start)
    _ops.cross_entropy_backward_(grad, logits, labels, stats, start)
    # So that a second backward pass raises an error instead of being wrong.
    torch.autograd.graph.increment_version(logits)
    return logits


def copy_boxes_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    scales: Sequence[float],
    low: Sequence[Tensor] = (),
) -> None:
    """targets[k] = sources[k] * scales[k] for many boxes at once.

    Args:
        targets: views of the same dtype and device that do not overlap.
        sources: same shapes, dtype and device as the targets; any strides.
        scales: one factor each.
        low: empty, or for each target a bf16 or fp16 copy with equal strides, which is also
            written.
    """
    if targets and own("copy_boxes", targets[0]):
        _ops.copy_boxes_(list(targets), list(sources), list(low), list(scales))
    else:
        references.copy_boxes_(targets, sources, low, scales)
