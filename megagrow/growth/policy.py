"""State policies: how optimizer state and learning rates are carried through a growth, as data.

Sources: `exact`, megagrow's laws 4 and 5; `sparkling`, Yu et al., arXiv 2602.02472 (old block keeps
its moments, new blocks start at zero and re-warm to 1.3 times the learning rate over 250 steps,
with their own step count in the bias correction); `kept`, the same without the re-warm, as MSG
(arXiv 2305.02869) keeps old blocks; `shen`, Shen et al., arXiv 2203.06211, as published and for any
factor: moments follow the gradient's factors where parameters were copied, are zero where they
start at 0, and rates are unchanged; `copy` and `reset` are used by papers on stacking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagrow.errors import GrowthError
from megagrow.growth.operator import GrowthBlock
from megagrow.state.catalog import SlotKind

Moments = Literal["gradient", "copied gradient", "kept", "copy", "zero"]


@dataclass(frozen=True)
class StatePolicy:
    """A way to carry optimizer state through a growth.

    Attributes:
        name: its name in the configuration.
        summary: one line on what it does.
        moments: "gradient": g * m and g^2 * v in every block (the slot law); "copied
            gradient": the same, but zero in blocks whose parameters start at 0;
            "kept": unchanged in the old block, zero in new blocks; "copy": unchanged in every
            block; "zero": all zero.
        scale_rates: whether lr, weight decay and eps are rescaled per tensor so that
            the grown run retraces the small one (the dynamics law).
        new_block_peak: multiple of the learning rate that new blocks re-warm to, or None.
        restart_steps: whether the optimizer's step count is reset.
        rewarm: default number of re-warm steps: for the new blocks if `new_block_peak` is set, else
            for the learning rate of all parameters.
    """

    name: str
    summary: str
    moments: Moments
    scale_rates: bool = False
    new_block_peak: float | None = None
    restart_steps: bool = False
    rewarm: int = 0

    def caveat(self, *, grad_clip: float, dropout: float) -> str | None:
        """Warnings: what makes the policy inexact.

        Args:
            grad_clip: the norm that the run clips gradients at; 0 for none.
            dropout: the model's.
        """
        if not self.scale_rates:
            return None
        reasons = []
        if grad_clip > 0:
            reasons.append(
                "retraces the small run only while no gradient is clipped, since the grown model's "
                "has another norm: optimizer.grad_clip=0 makes sure"
            )
        if dropout > 0:
            reasons.append(
                "does not retrace the small run under dropout, whose copies of a unit are dropped "
                "each by itself: model.dropout=0 makes sure"
            )
        return "; and ".join(reasons) or None

    def coefficient(self, block: GrowthBlock, kind: SlotKind) -> float:
        """The factor of a slot's old values in a block; 0 drops them.

        Raises:
            GrowthError: the policy needs the block's gradient, but its operator states none.
        """
        if kind == "parameter":
            return block.param
        if self.moments == "zero" or (self.moments == "kept" and block.new):
            return 0.0
        if self.moments in ("copy", "kept"):
            return block.share
        if self.moments == "copied gradient" and block.param == 0.0:
            return 0.0
        if block.grad is None:
            raise GrowthError(
                f"state policy {self.name!r} follows the gradient, but the operator does not "
                f"keep the loss and so states no gradient for {block.source}",
                fix="set grow.state_policy to copy or reset",
            )
        return block.grad if kind == "first_moment" else block.grad**2


POLICIES = {
    policy.name: policy
    for policy in (
        StatePolicy(
            "sparkling",
            "old block keeps its moments; new blocks start at 0 and re-warm to 1.3 x lr",
            moments="kept",
            new_block_peak=1.3,
            rewarm=250,
        ),
        StatePolicy(
            "exact",
            "m * g, v * g^2 in all blocks; lr, weight decay and eps rescaled: retraces",
            moments="gradient",
            scale_rates=True,
        ),
        StatePolicy(
            "shen",
            "m * g, v * g^2 where parameters were copied, rates unchanged; lr re-warms",
            moments="copied gradient",
            rewarm=150,
        ),
        StatePolicy(
            "kept",
            "old block keeps its moments; new blocks start at 0, their steps counted from 0",
            moments="kept",
            new_block_peak=1.0,
        ),
        StatePolicy("copy", "every block takes its source's moments", moments="copy"),
        StatePolicy(
            "reset",
            "moments and step count start again; the learning rate re-warms",
            moments="zero",
            restart_steps=True,
            rewarm=150,
        ),
    )
}
