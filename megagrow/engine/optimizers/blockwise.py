"""Optimizers that give the new parameters of grown tensors their own learning rates.

The optimizer sees what DeepSpeed passes it: whole parameters, or one flat partition of many.
Where a tensor has new ("young") blocks, the partition is stepped in pieces: flat ranges as
usual, and inside such a tensor's box the old block and the new ones separately, as strided
views.  No memory per element is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw

from megagrow import ops
from megagrow.engine.optimizers.generations import generations, regions
from megagrow.growth.optimizer_rules import YoungBlocks
from megagrow.state.boxes import Box

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class YoungShard:
    """A box that contains new blocks, contiguous in a flat parameter from `start` on.

    `box` is in the logical tensor's coordinates, like the blocks.
    """

    start: int
    box: Box
    blocks: YoungBlocks


class Observer(Protocol):
    """Observes updates."""

    def update(self, groups: Sequence[Mapping[str, Any]]) -> AbstractContextManager[None]:
        """Wraps the update of parameter groups whose gradients are in ``.grad``."""
        ...


class BlockOptimizer(torch.optim.Optimizer):
    """The shared base: state allocated before the first step, and steps in pieces.

    Parameter groups may carry ``lr_factor``, a multiplier on the run's learning rate.
    """

    moments: tuple[str, ...] = ()
    _young: dict[torch.Tensor, Sequence[YoungShard]]
    # Called before each update; gradient clipping hooks in here where DeepSpeed does none.
    before_step: Callable[[], None] | None = None
    # Called after `before_step`; False skips the update.
    accept: Callable[[], bool] | None = None
    # Observes the update that follows, if set.
    probe: Observer | None = None

    def set_learning_rate(self, lr: float) -> None:
        """Set the run's learning rate; each group applies its own multiplier."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def set_young(self, young: Mapping[torch.Tensor, Sequence[YoungShard]]) -> None:
        """Set which boxes of which parameters contain new blocks."""
        self._young = {p: sorted(s, key=lambda x: x.start) for p, s in young.items() if s}

    def make_state(
        self,
        parameters: Iterable[torch.Tensor],
        *,
        step: int,
        moments: Callable[[torch.Tensor], Iterable[str]] | None = None,
    ) -> None:
        """Create the state that a first step would create: zero moments and the step count.

        Args:
            parameters: the tensors that will be stepped (DeepSpeed may hold them itself and
                put them into the parameter groups only for the time of a step).
            step: number of updates already done.
            moments: names of the moments that each tensor keeps; by default all of the optimizer's.
        """
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
            for name in self.moments if moments is None else moments(parameter):
                state[name] = torch.zeros_like(parameter, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Do one update; the gradient must be in ``.grad``."""
        if self.before_step is not None:
            self.before_step()
        if self.accept is not None and not self.accept():
            return None
        if self.probe is None:
            return self._update_all(closure)
        with self.probe.update(self.param_groups):
            return self._update_all(closure)

    def _update_all(self, closure: Any) -> Any:
        if self._step_in_one_pass():
            return None
        if not any(p in self._young for g in self.param_groups for p in g["params"]):
            return self._step_whole(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_in_pieces(group, parameter)
        return None

    def _step_in_one_pass(self) -> bool:
        """Do the whole update in one kernel, new blocks included; False if none applies."""
        return False

    def _step_whole(self, closure: Any) -> Any:
        """Do one update of parameters that have no new blocks."""
        raise NotImplementedError

    @staticmethod
    def _update(
        group: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
        *,
        steps: int,
        lr_factor: float = 1.0,
        fused: bool = False,
    ) -> None:
        """Update (parameter, gradient, moments) in place; `steps` includes this update."""
        raise NotImplementedError

    def _step_in_pieces(self, group: Mapping[str, Any], parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            raise RuntimeError("new blocks need optimizer state: call make_state first")
        before = int(state["step"])
        tensors = (parameter, parameter.grad, *(state[name] for name in self.moments))
        flat = [t.view(-1) for t in tensors if t is not None]
        position = 0
        for shard in self._young.get(parameter, ()):
            self._update(group, [t[position : shard.start] for t in flat], steps=before, fused=True)
            position = shard.start + shard.box.volume
            boxes = [t[shard.start : position].view(shard.box.shape) for t in flat]
            for index, young in generations(shard.blocks, shard.box):
                self._update(
                    group,
                    [t[index] for t in boxes],
                    steps=before if young is None else before - young.born,
                    lr_factor=1.0 if young is None else young.lr_factor(before + 1),
                )
        self._update(group, [t[position:] for t in flat], steps=before, fused=True)
        state["step"] += 1


class BlockAdamW(BlockOptimizer, torch.optim.AdamW):
    """Decoupled AdamW (Loshchilov & Hutter, arXiv 1711.05101) with new blocks."""

    moments = MOMENTS

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        torch.optim.AdamW.__init__(self, groups, lr=0.0, betas=betas, fused=True)
        self._young = {}
        self._tables: dict[torch.Tensor, torch.Tensor] = {}  # for the kernel

    def set_young(self, young: Mapping[torch.Tensor, Sequence[YoungShard]]) -> None:
        """Set which boxes of which parameters contain new blocks."""
        super().set_young(young)
        self._tables.clear()

    def _step_whole(self, closure: Any) -> Any:
        return torch.optim.AdamW.step(self, closure)

    def _step_in_one_pass(self) -> bool:
        """Do the whole update in one kernel, new blocks included; False if none applies.

        Requires the state that `make_state` creates.
        """
        work = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not work or not all(
            self.state[p] and ops.adamw_serves(p, young=p in self._young) for _, p in work
        ):
            return False
        # Counted once for all tensors, so that the CPU syncs with the GPU only once.
        step = int(self.state[work[0][1]]["step"]) + 1
        for group, p in work:
            state, young = self.state[p], self._young.get(p)
            table = rates = None
            if young:
                if p not in self._tables:
                    boxes = [box for s in young for box in _young_boxes(s)]
                    self._tables[p] = ops.young_table(boxes, p.device)
                table = self._tables[p]
                rates = ops.young_rates(
                    [
                        (group["lr"] * blocks.lr_factor(step), step - blocks.born)
                        for s in young
                        for blocks in _innermost_first(s.blocks)
                    ],
                    betas=group["betas"],
                    device=p.device,
                )
            ops.adamw_(
                p.view(-1),
                p.grad.contiguous().view(-1),
                *(state[name].view(-1) for name in MOMENTS),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=step,
                young=table,
                rates=rates,
            )
            state["step"] += 1
        return True

    @staticmethod
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


class BlockLion(BlockOptimizer):
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2) with new blocks.

    It moves every element by the learning rate, in the direction of the sign of
    beta1 m + (1 - beta1) g, and keeps only m = beta2 m + (1 - beta2) g.  The sign does not
    depend on the gradient's scale, so the rates set for a growth apply as they do with AdamW.
    """

    moments = MOMENTS[:1]

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0, "eps": 0.0})
        self._young = {}

    def _step_whole(self, closure: Any) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if not members:
                continue
            gradients = [p.grad for p in members if p.grad is not None]
            states = [self.state[p] for p in members]
            _lion(group, members, gradients, [s["exp_avg"] for s in states], lr=group["lr"])
            for state in states:
                state["step"] += 1
        return loss

    @staticmethod
    def _update(
        group: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
        *,
        steps: int,
        lr_factor: float = 1.0,
        fused: bool = False,
    ) -> None:
        del steps, fused  # no bias correction, and only one implementation
        parameter, gradient, exp_avg = tensors
        _lion(group, [parameter], [gradient], [exp_avg], lr=group["lr"] * lr_factor)


def _lion(
    group: Mapping[str, Any],
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    *,
    lr: float,
) -> None:
    beta1, beta2 = group["betas"]
    directions = torch._foreach_lerp(exp_avgs, gradients, 1 - beta1)
    torch._foreach_sign_(directions)
    torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    torch._foreach_add_(parameters, directions, alpha=-lr)
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta2)


def _innermost_first(blocks: YoungBlocks) -> list[YoungBlocks]:
    """The new blocks of a tensor, the earliest growth first."""
    return [*(_innermost_first(blocks.inside) if blocks.inside else ()), blocks]


def _young_boxes(shard: YoungShard) -> list[ops.YoungBox]:
    """A shard's entries in the kernel's table: one box per growth."""
    olds = [regions(blocks.kept, shard.box)[0] for blocks in _innermost_first(shard.blocks)]
    return [ops.YoungBox(shard.start, shard.box.shape, old[0] if old else None) for old in olds]
