"""One function an op: the own kernel, a chosen library, or PyTorch's own op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.ops import references
from megagrow.ops.autograd import RotaryInPlace
from megagrow.ops.library import own
from megagrow.ops.third_party import alternative

BOX_AXES = 4  # of a box that `copy_boxes_` takes, after axes that lie end to end are joined

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
    """Whether an own kernel adds the residual and normalises in one pass."""
    same = weight.dtype == residual.dtype == x.dtype
    return same and own(op, x) and alternative(op, x) is None


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of x [..., 2 n] whose last axis has the gates first -> [..., n]."""
    gate, up = x.chunk(2, dim=-1)
    other = alternative("swiglu", x)
    if other is not None:
        return other(gate, up)
    return _ops.swiglu(x.contiguous()) if own("swiglu", x) else F.silu(gate) * up


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x [..., n] + bias [n], in its tanh form, which is GPT-2's own."""
    if own("bias_gelu", x) and bias.dtype == x.dtype:
        return _ops.bias_gelu(x.contiguous(), bias)
    return F.gelu(x + bias, approximate="tanh")


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """Turn heads by their positions in place (see `megagrow.models.common.rotary` for the pairs).

    Args:
        x: [B, S, G, heads, D] contiguous; overwritten, so nothing else may need it.
        cos: [S, D / 2], fp32 (fp64 for fp64).
        sin: the same.
        turned: how many heads of each group, from the first on.

    Returns:
        x, as autograd knows it after the turn.
    """
    return RotaryInPlace.apply(x, cos, sin, turned)


def softmax_stats(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    """What a cross entropy needs of one rank's logits, before ranks merge it.

    Args:
        logits: [rows, columns], the vocabulary from `start` on; columns may be 0.
        labels: [rows] token ids.
        start: token id of the first column.

    Returns:
        [3, rows] in fp32 (fp64 for fp64): the greatest logit (-inf without columns), the sum of
        exp(logit - greatest), and the logit at the label, or 0 where it is not here.
    """
    if own("cross_entropy", logits):
        return _ops.softmax_stats(logits.contiguous(), labels.contiguous(), start)
    return references.softmax_stats(logits, labels, start)


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int, *, in_place: bool
) -> Tensor:
    """Grad * (softmax - 1 at the label), [rows, columns].

    Args:
        grad: [rows], of the losses, in the type of `stats`.
        logits: as for `softmax_stats`.
        labels: likewise.
        stats: of whole rows, merged over the ranks.
        start: as for `softmax_stats`.
        in_place: whether an own kernel may overwrite contiguous logits, and return them.
    """
    if not own("cross_entropy", logits):
        return references.cross_entropy_backward(grad, logits, labels, stats, start)
    grad, stats, labels = grad.contiguous(), stats.contiguous(), labels.contiguous()
    if not (in_place and logits.is_contiguous()):
        return _ops.cross_entropy_backward(grad, logits.contiguous(), labels, stats, start)
    _ops.cross_entropy_backward_(grad, logits, labels, stats, start)
    # So that a second backward pass is an error, and not wrong.
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
        targets: views of one type and device, which do not overlap.
        sources: of the targets' shapes, type and device; any strides.
        scales: a factor each.
        low: none, or for each target a bf16 or fp16 copy of equal strides, written as well.
    """
    if targets and own("copy_boxes", targets[0]):
        _ops.copy_boxes_(list(targets), list(sources), list(low), list(scales))
    else:
        references.copy_boxes_(targets, sources, low, scales)
