"""The next-token loss, over a vocabulary that tensor-parallel ranks share out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megagrow.model.parallel import SERIAL, TensorParallel, all_reduce

# Elements that are turned to fp32 at a time: few enough to stay in a core's cache, or for a GPU
# enough to fill it.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, start: int = 0, parallel: TensorParallel = SERIAL
) -> torch.Tensor:
    """Cross entropy in nats, the softmax in fp32 at least; logits are never gathered.

    Args:
        logits: [..., v], this rank's part of the vocabulary, without padding; v may be 0.
        labels: [...] token ids, the same on all ranks.
        start: token id of this rank's first logit.
        parallel: the ranks that share the vocabulary.

    Returns:
        [...] losses, the same on all ranks, fp32 (fp64 for fp64 logits).
    """
    flat = logits.reshape(labels.numel(), logits.shape[-1])
    return _CrossEntropy.apply(flat, labels.reshape(-1), start, parallel).view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and two numbers a row: the greatest logit, and the sum of exponentials.

    It works on few rows at a time, so that fp32 copies of low-precision logits stay small.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, start: int, parallel: TensorParallel
    ) -> torch.Tensor:
        rows, width = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ours = (labels >= start) & (labels < start + width)
        index = (labels - start).masked_fill(~ours, 0)
        # These values stand where a rank has padding only.
        top = logits.new_full((rows,), -torch.inf, dtype=dtype)
        total = logits.new_zeros(rows, dtype=dtype)
        target = logits.new_zeros(rows, dtype=dtype)
        for chunk in _chunks(logits):
            top[chunk] = logits[chunk].amax(-1)
            total[chunk] = (logits[chunk] - top[chunk].unsqueeze(1)).exp_().sum(-1)
        if width:
            target = logits.gather(1, index.unsqueeze(1)).squeeze(1).to(dtype)
        if parallel.size > 1:
            ours_top, top = top, all_reduce(top.clone(), parallel, dist.ReduceOp.MAX)
            target = target.masked_fill(~ours, 0.0)
            sums = torch.stack((total * (ours_top - top).exp_(), target))
            total, target = all_reduce(sums, parallel)
        ctx.save_for_backward(logits, top, total, index, ours)
        # In this order, so that nothing is lost where all logits are large.
        return total.log() - (target - top)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, top, total, index, ours = ctx.saved_tensors
        out = torch.empty_like(logits)
        at_target = grad.neg().masked_fill_(~ours, 0.0).unsqueeze(1)
        scale, top, index = (grad / total).unsqueeze(1), top.unsqueeze(1), index.unsqueeze(1)
        for chunk in _chunks(logits):
            # grad * (softmax, less one at the target)
            p = (logits[chunk] - top[chunk]).exp_().mul_(scale[chunk])
            out[chunk] = p.scatter_add_(1, index[chunk], at_target[chunk])
        return out, None, None, None


def _chunks(logits: torch.Tensor) -> list[slice]:
    rows, width = logits.shape
    if width == 0:
        return []
    size = max(1, _CHUNK.get(logits.device.type, _CHUNK["cuda"]) // width)
    return [slice(at, at + size) for at in range(0, rows, size)]
