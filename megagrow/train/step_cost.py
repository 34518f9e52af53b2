"""What a step computes, for the rate that the log shows (FLOP/s).

Budgets count attention over whole samples: what a stage costs is known before it starts. A rate
counts what was computed: documents that do not see each other attend each to itself.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megagrow.models.flops import train_flops_per_token
from megagrow.train.run_plan import Stage


class StepCost:
    """Counts FLOPs of the samples of a step.

    Args:
        stage: the stage.
        eod: the end token, if documents of a sample do not see each other.
    """

    def __init__(self, stage: Stage, eod: int | None) -> None:
        self._stage, self._eod = stage, eod
        self._flops_at: dict[int, int] = {}
        self._flops = 0

    def add(self, samples: np.ndarray) -> None:
        """Samples [n, sequence + 1] that this rank reads for the step."""
        if self._eod is None:
            return
        for row in samples[:, :-1]:
            begins = np.flatnonzero(row[:-1] == self._eod) + 1
            borders = [0, *begins.tolist(), len(row)]
            self._flops += sum(self._of(b - a) for a, b in pairwise(borders))

    def _of(self, length: int) -> int:
        """FLOPs of a document of this length."""
        if length not in self._flops_at:
            model = self._stage.model.model_copy(update={"sequence": length})
            self._flops_at[length] = length * train_flops_per_token(model, self._stage.catalog)
        return self._flops_at[length]

    def take(self) -> float:
        """This rank's share of the step's FLOPs; the sum over all ranks is the step's."""
        layout, flops = self._stage.layout, self._flops
        self._flops = 0
        if self._eod is None:
            return self._stage.plan.flops_per_step / layout.world
        return flops / (layout.tensor * layout.pipeline)  # ranks that read the same samples
