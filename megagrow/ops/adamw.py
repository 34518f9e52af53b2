"""AdamW on a flat partition in one pass, with separate rates for new ("young") blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow.ops.library import own
from megagrow.ops.third_party import alternative

AXES = 4


@dataclass(frozen=True)
class YoungBox:
    """A box of a flat tensor, in which everything except an old block is young.

    Attributes:
        start: the box's first flat position; the box is contiguous.
        shape: its shape, at most four axes.
        old: the old block inside the box: a slice per axis (start, stop, positive step); None if
            the whole box is young.
    """

    start: int
    shape: tuple[int, ...]
    old: tuple[slice, ...] | None


def young_table(boxes: Sequence[YoungBox], device: torch.device | str = "cpu") -> Tensor:
    """The table argument of the op: int64 [boxes, 18].

    Each row: start, volume, then for four axes (shorter shapes are padded in front) the sizes, and
    the start, step and count of the old block.

    Args:
        boxes: sorted by start and not overlapping, except that several may have the same start and
            shape. Then each one's old block is inside the old block of the next, and an element
            belongs to the last box in which it is young.
        device: device of the partition.

    Raises:
        ValueError: a box has more than four axes or 2^31 elements.
    """
    rows = []
    for box in boxes:
        volume, missing = math.prod(box.shape), AXES - len(box.shape)
        if missing < 0 or volume >= 2**31:
            raise ValueError(f"a young box has at most 4 axes and 2^31 elements, not {box.shape}")
        old = [(0, 1, 0 if box.old is None else 1)] * missing
        for axis, length in enumerate(box.shape):
            if box.old is None:
                old.append((0, 1, 0))
            else:
                begin, stop, step = box.old[axis].indices(length)
                old.append((begin, step, len(range(begin, stop, step))))
        rows.append(
            [box.start, volume, *[1] * missing, *box.shape]
            + [part[k] for k in range(3) for part in old]
        )
    table = torch.tensor(rows, dtype=torch.int64).view(len(rows), 2 + 4 * AXES)
    return table.to(device)


def young_rates(
    rates: Sequence[tuple[float, int]],
    *,
    betas: tuple[float, float],
    device: torch.device | str = "cpu",
) -> Tensor:
    """The rates of the young elements of each box: fp32 [boxes, 3].

    Args:
        rates: for each box the learning rate and the number of this update, from 1.
        betas: of the moments.
        device: device of the partition.
    """
    rows = [
        (lr, lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)) for lr, step in rates
    ]
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), 3).to(device)


def adamw_serves(parameter: Tensor, *, young: bool) -> bool:
    """Whether a kernel can update this parameter; with young boxes only megagrow's own can."""
    if parameter.dtype != torch.float32:
        return False
    other = alternative("adamw", parameter) is not None
    return own("adamw", parameter) or (other and not young)


def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    low: Tensor | None = None,
    scale: Tensor | None = None,
    young: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """One in-place update of a flat partition: 28 bytes per element with a bf16 gradient and copy.

    Args:
        parameter: fp32 [n], the master; contiguous.
        gradient: [n], fp32, bf16 or fp16.
        exp_avg: fp32 [n].
        exp_avg_sq: fp32 [n].
        lr: the learning rate of this update.
        betas: of the moments.
        eps: added to the denominator.
        weight_decay: decoupled, times lr.
        step: the number of this update, from 1.
        low: bf16 or fp16 [n], receives the new parameters.
        scale: fp32 scalar on the device that multiplies the gradient: clipping, and the inverse of
            a loss scale.
        young: from `young_table`.
        rates: from `young_rates`, for this update.
    """
    other = alternative("adamw", parameter)
    if other is not None and low is None and scale is None and young is None:
        other(
            parameter, gradient, exp_avg, exp_avg_sq, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, step=step,
        )  # fmt: skip
        return
    torch.ops.megagrow.adamw_(
        parameter, gradient, exp_avg, exp_avg_sq, low, scale, young, rates,
        lr, *betas, eps, weight_decay, step,
    )  # fmt: skip
