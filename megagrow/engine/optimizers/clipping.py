"""Gradient clipping for the one case where DeepSpeed reports no norm: fp32 at ZeRO 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megagrow.engine.deepspeed.privates import counts_in_norm
from megagrow.engine.groups import Groups


@dataclass
class GradientClipper:
    """Scales the gradients of one model replica so that their norm is at most `bound`.

    The norm is that of the logical gradient: a parameter replicated on several ranks is counted
    once, whatever the layout.

    Attributes:
        parameters: this rank's, with gradients already averaged over the data-parallel ranks.
        groups: the process groups.
        bound: the maximum norm; 0 only measures.
        device: where the norm is computed, also on a rank that has no gradient.
        norm: the last norm before clipping.
    """

    parameters: Sequence[nn.Parameter]
    groups: Groups
    bound: float
    device: torch.device
    norm: float = 0.0

    @torch.no_grad()
    def __call__(self) -> None:
        """Measure and clip."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        counted = [p.grad for p in self.parameters if p.grad is not None and self._counts(p)]
        square = torch.zeros((), dtype=torch.float32, device=self.device)
        if counted:
            square = nn.utils.get_total_norm(counted).float() ** 2
        if self.groups.model is not None:
            dist.all_reduce(square, group=self.groups.model)
        self.norm = float(square.sqrt())
        if gradients and 0 < self.bound < self.norm:
            torch._foreach_mul_(gradients, self.bound / (self.norm + 1e-6))

    def _counts(self, parameter: nn.Parameter) -> bool:
        at = self.groups.layout.coordinates(self.groups.rank)
        return counts_in_norm(parameter, tensor_rank=at.tensor)
