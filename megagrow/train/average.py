"""The mean of a run's last weights, which is usually slightly better than the last weights.

Averaging over the last part of a run removes noise that remains after a decay (Izmailov et
al., arXiv 1803.05407; Sandler et al., arXiv 2307.11684).  Each rank keeps the mean of its own
master weights in host memory, in fp32; nothing is communicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megagrow.config.loop import AverageConfig
from megagrow.engine.engine import Engine
from megagrow.state.catalog import MASTER

_MOST = 64  # number of states averaged


class WeightAverage:
    """A running mean over the last steps of a run; all ranks call all methods together.

    It is not saved: a run that is resumed within the window starts it again, with fewer states
    in it (`count`).

    Args:
        config: the averaging window; None keeps no mean.
    """

    def __init__(self, config: AverageConfig | None) -> None:
        self._config = config
        self._mean: list[torch.Tensor] = []
        self.count = 0

    def begin(self) -> None:
        """Discard the mean: the engine, or its state, has changed."""
        self._mean, self.count = [], 0

    def wanted(self, total_steps: int) -> int:
        """Number of states that an uninterrupted run of this length averages; 0 for none."""
        if self._config is None:
            return 0
        window, stride = self._window(total_steps)
        return -(-window // stride)

    def after_step(self, engine: Engine, *, step: int, total_steps: int) -> None:
        """Add the state after a step, if it is one of those averaged.

        Args:
            step: number of steps done.
            total_steps: of the whole run.
        """
        if self._config is None:
            return
        window, stride = self._window(total_steps)
        left = total_steps - step
        if left >= window or left % stride:
            return
        self.count += 1
        for index, values in enumerate(_masters(engine)):
            here = values.to("cpu", torch.float32, copy=True)
            if index == len(self._mean):
                self._mean.append(here)
            else:
                self._mean[index].add_(here.sub_(self._mean[index]), alpha=1 / self.count)

    @contextlib.contextmanager
    def in_place(self, engine: Engine) -> Iterator[None]:
        """Swap the mean in for the weights, which are restored bit for bit."""
        held = [values.clone() for values in _masters(engine)]
        try:
            self._write(engine, self._mean)
            yield
        finally:
            self._write(engine, held)

    def _window(self, total_steps: int) -> tuple[int, int]:
        """Number of steps in the window, and how often a state is added."""
        assert self._config is not None
        window = max(1, round(self._config.last * total_steps))
        return window, -(-window // _MOST)

    @staticmethod
    def _write(engine: Engine, values: list[torch.Tensor]) -> None:
        for master, value in zip(_masters(engine), values, strict=True):
            master.copy_(value)
        engine.publish()


def _masters(engine: Engine) -> Iterator[torch.Tensor]:
    """Views of all master weights that this rank holds, always in the same order."""
    for shard in engine.placement.shards(engine.comm.rank):
        yield engine.state.view(shard.tensor, MASTER.name, shard.box).detach()
