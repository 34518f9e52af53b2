"""AdamW that knows young blocks: the new parts of grown tensors have rates of their own.

The optimizer sees what DeepSpeed gives it: whole parameters, or one flat
partition of many.  Where a tensor has young blocks, the partition is stepped
in pieces: flat ranges as usual, and inside a young tensor's box the old block
and the new ones apart, as strided views.  No memory per element is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from megagrow.growth.rules import Progression, YoungBlocks
from megagrow.state.boxes import Box

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class YoungShard:
    """A box with young blocks, contiguous in a flat parameter from `start` on.

    `box` is in the logical tensor's coordinates, like the blocks.
    """

    start: int
    box: Box
    blocks: YoungBlocks


class BlockAdamW(torch.optim.AdamW):
    """Decoupled AdamW (Loshchilov & Hutter, arXiv 1711.05101) with young blocks.

    Parameter groups may carry ``lr_factor``, the multiple of the run's learning rate.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=0.0, betas=betas, fused=True)
        self._young: dict[torch.Tensor, Sequence[YoungShard]] = {}
        # Called before each update; gradient clipping hooks in here where DeepSpeed has none.
        self.before_step: Callable[[], None] | None = None

    def set_learning_rate(self, lr: float) -> None:
        """Set the run's learning rate; each group takes its own multiple."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def set_young(self, young: Mapping[torch.Tensor, Sequence[YoungShard]]) -> None:
        """Say which boxes of which parameters have young blocks."""
        self._young = {p: sorted(s, key=lambda x: x.start) for p, s in young.items() if s}

    def make_state(self, parameters: Iterable[torch.Tensor], *, step: int) -> None:
        """Create the state that a first step would: zero moments, and the step count.

        Args:
            parameters: the tensors that will be stepped (DeepSpeed may hold them itself and
                put them into the parameter groups only for the time of a step).
            step: updates that count as done.
        """
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the gradient must be in ``.grad``."""
        if self.before_step is not None:
            self.before_step()
        if not any(p in self._young for g in self.param_groups for p in g["params"]):
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_in_pieces(group, parameter)
        return None

    def _step_in_pieces(self, group: Mapping[str, Any], parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            raise RuntimeError("young blocks need optimizer state: call make_state first")
        before = int(state["step"])
        flat = [
            t.view(-1)
            for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            if t is not None
        ]
        position = 0
        for shard in self._young.get(parameter, ()):
            _update(group, [t[position : shard.start] for t in flat], steps=before, fused=True)
            position = shard.start + shard.box.volume
            boxes = [t[shard.start : position].view(shard.box.shape) for t in flat]
            old, new = regions(shard.blocks.kept, shard.box)
            for index in old:
                _update(group, [t[index] for t in boxes], steps=before)
            factor = shard.blocks.lr_factor(before + 1)
            for index in new:
                _update(
                    group,
                    [t[index] for t in boxes],
                    steps=before - shard.blocks.born,
                    lr_factor=factor,
                )
        _update(group, [t[position:] for t in flat], steps=before, fused=True)
        state["step"] += 1


def _update(
    group: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    *,
    steps: int,
    lr_factor: float = 1.0,
    fused: bool = False,
) -> None:
    parameter, gradient, exp_avg, exp_avg_sq = tensors
    if parameter.numel() == 0:
        return
    adamw(
        [parameter],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(steps), device=parameter.device if fused else "cpu")],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"] * lr_factor,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


Index = tuple[slice, ...]


def regions(kept: Sequence[Progression] | None, box: Box) -> tuple[list[Index], list[Index]]:
    """Cut a box into its old part and its young parts.

    Args:
        kept: per axis the old block's elements, in logical coordinates; None if all is young.
        box: the box, in logical coordinates.

    Returns:
        (at most one index of the old part, indices of the young parts); indices count from the
        box's corner, do not overlap and cover the box.
    """
    everything = tuple(slice(0, n) for n in box.shape)
    if kept is None:
        return [], [everything]
    inside = [
        _clip(progression, start, stop)
        for progression, start, stop in zip(kept, box.offset, box.stop, strict=True)
    ]
    if any(part is None for part in inside):
        return [], [everything]
    old = tuple(part for part in inside if part is not None)
    young: list[Index] = []
    for axis, part in enumerate(old):
        # Old on the axes before, young on this one, anything behind: disjoint, and all of it.
        young += [
            (*old[:axis], gap, *everything[axis + 1 :]) for gap in _gaps(part, box.shape[axis])
        ]
    return [old], young


def _clip(progression: Progression, start: int, stop: int) -> slice | None:
    first, step, count = progression
    low = max(0, -((first - start) // step))
    high = min(count, -((first - stop) // step))
    if low >= high:
        return None
    begin = first + low * step - start
    return slice(begin, begin + (high - low - 1) * step + 1, step)


def _gaps(part: slice, length: int) -> Iterator[slice]:
    """Progressions that cover what a progression leaves of [0, length)."""
    step = part.step or 1
    if part.start > 0:
        yield slice(0, part.start)
    for residue in range(1, step):
        # The last period may reach past the old block's last element; clip it there.
        if part.start + residue < part.stop:
            yield slice(part.start + residue, part.stop, step)
    if part.stop < length:
        yield slice(part.stop, length)
