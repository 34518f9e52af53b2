"""Tensor and sequence parallelism: the process group, and entering and leaving its regions.

Inside the tensor-parallel region every rank holds its own heads, ffn units or vocabulary;
outside, all ranks hold the same tensors.  With sequence parallelism each rank holds its part
of the sequence outside.  Each function below enters or leaves a region: a collective forward,
its transpose backward (Shoeybi et al., Megatron-LM, arXiv 1909.08053; Korthikanti et al.,
arXiv 2205.05198).  With one rank they are no-ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megagrow.config import ModelConfig
from megagrow.errors import ConfigError

SEQUENCE = 1  # axis of activations [B, S, E]


@dataclass(frozen=True)
class TensorParallel:
    """This rank in its tensor-parallel group.

    Attributes:
        group: the torch.distributed process group; None for one rank.
        rank: this one, from 0.
        size: number of ranks.
        sequence: whether norms, dropout and residual stream are split along the sequence.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence: bool = False

    @property
    def splits_sequence(self) -> bool:
        """Whether a rank holds only a part of the sequence outside the tensor-parallel region."""
        return self.sequence and self.size > 1


SERIAL = TensorParallel()


def require_tensor_parallel(
    model: ModelConfig, *, tensor: int, sequence: bool = False, key: str = "layout"
) -> None:
    """Check that a model can be split over `tensor` ranks.

    Args:
        model: the model.
        tensor: number of ranks.
        sequence: whether the sequence is split as well.
        key: the configuration key to name in errors, e.g. ``stages[1].layout``.

    Raises:
        ConfigError: heads, ffn units or (with sequence parallelism) the sequence are not divisible.
    """
    counts = {"kv_heads" if model.kv_heads else "heads": model.kv_groups, "ffn": model.ffn}
    if sequence:
        counts["sequence"] = model.sequence
    for name, count in counts.items():
        if count % tensor:
            raise ConfigError(
                f"{key}.tensor: model.{name} cannot be cut into {tensor} equal parts",
                found=f"model.{name} = {count}, {key}.tensor = {tensor}",
                expected=f"a {key}.tensor that divides {count}",
                fix=f"set {key}.tensor to a divisor of {count}, "
                f"or model.{name} to a multiple of {tensor}",
            )


# --- regions --------------------------------------------------------------------------------


def copy_to_tensor_parallel_region(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Forward: identity.  Backward: all-reduce.

    Also used for a replicated parameter that each rank applies to its part of the sequence: its
    gradient is then summed over the ranks.
    """
    return x if parallel.size == 1 else _Copy.apply(x, parallel)


def reduce_from_tensor_parallel_region(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Forward: all-reduce.  Backward: identity."""
    return x if parallel.size == 1 else _Reduce.apply(x, parallel)


def scatter_to_tensor_parallel_region(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Forward: this rank's part of the last axis.  Backward: all-gather."""
    return x if parallel.size == 1 else _Scatter.apply(x, parallel, x.dim() - 1)


def gather_from_tensor_parallel_region(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Forward: all-gather along the last axis.  Backward: this rank's part."""
    return x if parallel.size == 1 else _Gather.apply(x, parallel, x.dim() - 1)


def scatter_to_sequence_parallel_region(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Forward: this rank's part of the sequence.  Backward: all-gather."""
    return x if parallel.size == 1 else _Scatter.apply(x, parallel, SEQUENCE)


def gather_from_sequence_parallel_region(x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Forward: all-gather along the sequence.  Backward: reduce-scatter.

    For a sequence that enters the tensor-parallel region, where each rank computes a partial
    gradient.
    """
    return x if parallel.size == 1 else _GatherSequence.apply(x, parallel)


def reduce_scatter_to_sequence_parallel_region(
    x: torch.Tensor, parallel: TensorParallel
) -> torch.Tensor:
    """Forward: reduce-scatter along the sequence.  Backward: all-gather."""
    return x if parallel.size == 1 else _ReduceScatterSequence.apply(x, parallel)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad.clone(), ctx.parallel), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        return all_reduce(x.clone(), parallel)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel, axis: int) -> torch.Tensor:
        ctx.parallel, ctx.axis = parallel, axis
        return _part(x, parallel, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(grad, ctx.parallel, ctx.axis), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel, axis: int) -> torch.Tensor:
        ctx.parallel, ctx.axis = parallel, axis
        return all_gather(x, parallel, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _part(grad, ctx.parallel, ctx.axis), None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return all_gather(x, parallel, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter(grad, ctx.parallel, SEQUENCE)[0], None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return reduce_scatter(x, parallel, SEQUENCE)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(grad, ctx.parallel, SEQUENCE), None


# --- collectives ----------------------------------------------------------------------------

# Newer names of the same calls, for which PyTorch 2.13 does not warn.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(
    x: torch.Tensor, parallel: TensorParallel, op: Any = dist.ReduceOp.SUM
) -> torch.Tensor:
    """All-reduce (sum by default); a contiguous `x` is overwritten."""
    x = x.contiguous()
    dist.all_reduce(x, op=op, group=parallel.group)
    return x


def all_gather(x: torch.Tensor, parallel: TensorParallel, axis: int) -> torch.Tensor:
    """All-gather: the parts of all ranks, concatenated along an axis."""
    parts = x.new_empty(parallel.size, *x.shape)
    _gather_single(parts.flatten(0, 1), x.contiguous(), group=parallel.group)
    return parts.movedim(0, axis).flatten(axis, axis + 1)


def reduce_scatter(
    x: torch.Tensor, parallel: TensorParallel, axis: int, *, wait: bool = True
) -> tuple[torch.Tensor, Any]:
    """Reduce-scatter along an axis: this rank's part of the sum, and the work to wait for.

    With `wait`, it has completed and the work is None.
    """
    _require_equal_parts(x, parallel, axis)
    parts = x.unflatten(axis, (parallel.size, -1)).movedim(axis, 0).contiguous()
    mine = torch.empty_like(parts[0])
    work = _scatter_single(mine, parts.flatten(0, 1), group=parallel.group, async_op=not wait)
    return mine, work


def _part(x: torch.Tensor, parallel: TensorParallel, axis: int) -> torch.Tensor:
    _require_equal_parts(x, parallel, axis)
    length = x.shape[axis] // parallel.size
    return x.narrow(axis, parallel.rank * length, length).contiguous()


def _require_equal_parts(x: torch.Tensor, parallel: TensorParallel, axis: int) -> None:
    if x.shape[axis] % parallel.size:
        raise ValueError(
            f"axis {axis} of a tensor of shape {tuple(x.shape)} cannot be cut into "
            f"{parallel.size} equal parts, one for each tensor-parallel rank"
        )


# --- random numbers -------------------------------------------------------------------------


@contextmanager
def random_numbers_of_this_rank(parallel: TensorParallel, device: torch.device) -> Iterator[None]:
    """Inside, each tensor-parallel rank draws its own numbers; outside, all draw the same.

    The ranks start a step with the same seed.  A seed for the region is drawn from that common
    stream, which afterwards continues unaffected by the region; so the numbers depend on the step's
    seed alone, and activation recomputation, which restores the stream, repeats them.
    """
    if parallel.size == 1:
        yield
        return
    # Drawn on the CPU, to avoid synchronising with a GPU.
    seed = int(torch.randint(2**62, (), device="cpu")) + parallel.rank
    generator = _default_generator(device)
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def seed_random_numbers(seed: int, device: torch.device) -> None:
    """Like `torch.manual_seed`, but for the CPU and this device only, which is faster."""
    for generator in {_default_generator(torch.device("cpu")), _default_generator(device)}:
        generator.manual_seed(seed)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
