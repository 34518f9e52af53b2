"""Vocab-parallel cross entropy: the next-token loss over a split vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from megagrow import ops
from megagrow.models.common.parallel import SERIAL, TensorParallel, all_gather


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, start: int = 0, parallel: TensorParallel = SERIAL
) -> torch.Tensor:
    """Cross entropy in nats, with the softmax in at least fp32; logits are never gathered.

    The gradient may overwrite the logits, so nothing else may use them afterwards.

    Args:
        logits: [..., v], this rank's part of the vocabulary, without padding; v may be 0.
        labels: [...] token ids, the same on all ranks.
        start: token id of this rank's first logit.
        parallel: the ranks over which the vocabulary is split.

    Returns:
        [...] losses, the same on all ranks, fp32 (fp64 for fp64 logits).
    """
    flat = logits.reshape(labels.numel(), logits.shape[-1])
    return _CrossEntropy.apply(flat, labels.reshape(-1), start, parallel).view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits and two numbers per row: the largest logit, and the sum of exponentials.

    Each rank reads its logits once forward and once backward; ranks exchange three numbers per row.
    megagrow's kernel overwrites the logits with the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, start: int, parallel: TensorParallel
    ) -> torch.Tensor:
        stats = ops.softmax_stats(logits, labels, start)
        if parallel.size > 1:
            stats = _merged(all_gather(stats.unsqueeze(0), parallel, 0))
        top, total, target = stats
        ctx.save_for_backward(logits, labels, stats)
        ctx.start = start
        # In this order, so that no precision is lost when all logits are large.
        return total.log() - (target - top)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, labels, stats = ctx.saved_tensors
        out = ops.cross_entropy_backward(grad, logits, labels, stats, ctx.start, in_place=True)
        return out, None, None, None


def _merged(stats: torch.Tensor) -> torch.Tensor:
    """Combine the statistics of the ranks' parts, [T, 3, rows] -> [3, rows]."""
    tops, totals, targets = stats.unbind(1)
    top = tops.amax(0)
    return torch.stack((top, (totals * (tops - top).exp()).sum(0), targets.sum(0)))
