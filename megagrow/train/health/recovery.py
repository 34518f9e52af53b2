"""What to do about a loss or gradient that is not finite, or that spikes.

Such steps are first skipped: their update is not applied.  After too many in a row the run
rolls back to its last checkpoint and skips the data that led there (as for PaLM, Chowdhery et
al., arXiv 2204.02311, section 5.1).  After too many rollbacks it stops.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from megagrow.config import RecoveryConfig
from megagrow.errors import TrainingError

WINDOW = 32  # number of recent losses that a new one is compared with
_ENOUGH = 8


class RollBack(Exception):  # noqa: N818 - not an error: the run rolls back
    """Leaves the step loop to return to the last checkpoint.

    Attributes:
        why: the fault, in words.
        ranks: which ranks saw it, one entry per rank.
    """

    def __init__(self, why: str, ranks: Sequence[str]) -> None:
        super().__init__(why)
        self.why, self.ranks = why, list(ranks)


class StepGuard:
    """Judges steps; every rank has one, and all reach the same verdicts.

    Args:
        config: the limits.
        scaled: whether fp16 loss scaling already handles overflowing gradients.
    """

    def __init__(self, config: RecoveryConfig, *, scaled: bool) -> None:
        self.config, self._scaled = config, scaled
        self._recent: Sequence[float] = ()
        self._fault: str | None = None
        self._in_a_row = 0

    def begin(self, recent: Sequence[float]) -> None:
        """Start a step; `recent` are the losses of the last good ones."""
        self._recent, self._fault = recent, None

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether to apply the update of this step.

        Args:
            loss: mean over all ranks, nats per token.
            grad_norm: global gradient norm before clipping.
        """
        self._fault = fault(
            loss=loss, grad_norm=grad_norm, recent=self._recent, spike=self.config.spike
        )
        return self._fault is None

    def passes_over(
        self, *, step: int, losses: Sequence[float], grad_norm: float, applied: bool
    ) -> str | None:
        """The fault of a finished step that left no update, or None for a good one.

        Raises:
            RollBack: its update was applied, or there were too many bad steps in a row.
        """
        # DeepSpeed skips some steps by itself, without asking, as under ZeRO 1 and 2.
        why = self._fault or fault(
            loss=sum(losses),
            grad_norm=0.0 if self._scaled else grad_norm,
            recent=(),
            spike=None,
        )
        if why is None:
            self._in_a_row = 0
            return None
        ranks = [f"{x} on rank {r}" for r, x in enumerate(losses) if not math.isfinite(x)]
        if applied or self._in_a_row >= self.config.skip:
            self._in_a_row = 0
            raise RollBack(f"step {step}: {why}", ranks)
        self._in_a_row += 1
        return ", ".join([why, *ranks])


def fault(
    *, loss: float, grad_norm: float, recent: Sequence[float], spike: float | None
) -> str | None:
    """The fault of a step, in words, or None."""
    if not math.isfinite(loss):
        return "the loss is not finite"
    if not math.isfinite(grad_norm):
        return f"the gradient is not finite (norm {grad_norm})"
    if is_spike(loss, recent, spike):
        median = statistics.median(recent)
        return f"the loss of {loss:.4f} is over {spike:g} times the recent {median:.4f}"
    return None


def is_spike(loss: float, recent: Sequence[float], factor: float | None) -> bool:
    """Whether a loss is more than `factor` times the median of the recent ones."""
    if factor is None or len(recent) < _ENOUGH:
        return False
    return loss > factor * statistics.median(recent)


def remember(recent: Sequence[float], loss: float) -> tuple[float, ...]:
    """The recent losses with one appended and the oldest dropped."""
    return (*recent, loss)[-WINDOW:]


def no_way_back(
    bad: RollBack, *, last_good: Path | None, recovery: RecoveryConfig, rollbacks: int
) -> TrainingError:
    """The error that ends a run that may not roll back (again).

    Args:
        bad: the fault.
        last_good: the newest checkpoint, if there is one.
        recovery: the limits.
        rollbacks: how many times the run has rolled back.
    """
    return TrainingError(
        f"{bad.why}; the run stops without saving this step",
        found=", ".join(bad.ranks) or bad.why,
        expected=f"numbers that are finite and no spikes, after {recovery.skip} skipped "
        f"steps (recovery.skip) and {rollbacks} of {recovery.rollback} rollbacks "
        "(recovery.rollback)",
        fix=f"resume from the last good checkpoint ({last_good or 'none was saved yet'}) with a "
        "lower optimizer.lr, a longer schedule.warmup, or optimizer.grad_clip of at most 1",
    )
