"""Drive micro-batches through a DeepSpeed engine, with or without pipeline parallelism."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from megagrow.errors import ConfigError

ToDevice = Callable[[np.ndarray], torch.Tensor]


class Driver(Protocol):
    """Runs forward and backward passes."""

    def step(self, batches: Iterable[np.ndarray]) -> float:
        """One optimizer step over micro-batches [micro, S + 1]; returns their mean loss."""
        ...

    def loss_so_far(self) -> torch.Tensor | None:
        """Mean loss of the step's micro-batches so far; None on a rank that computes no loss."""
        ...

    def evaluate(self, samples: np.ndarray, *, micro: int) -> tuple[float, int]:
        """Sum of the losses of samples [n, S + 1], and the number of samples."""
        ...


class PlainDriver:
    """All layers on this rank, or its tensor-parallel slice of them.

    Losses are local to this data-parallel rank.
    """

    def __init__(self, engine: Any, to_device: ToDevice) -> None:
        self._engine, self._to_device = engine, to_device
        self._losses: list[torch.Tensor] = []

    def step(self, batches: Iterable[np.ndarray]) -> float:
        """One optimizer step."""
        if not self._engine.module.training:  # Module.train() walks all modules
            self._engine.train()
        self._losses = []
        for batch in batches:
            loss = self._engine(self._to_device(batch))
            self._losses.append(loss.detach())
            self._engine.backward(loss)
            self._engine.step()
        return float(self.loss_so_far())

    def loss_so_far(self) -> torch.Tensor:
        """Mean loss of the micro-batches so far."""
        return torch.stack(self._losses).mean()

    @torch.no_grad()
    def evaluate(self, samples: np.ndarray, *, micro: int) -> tuple[float, int]:
        """Sum of losses, computed in batches of at most `micro` samples."""
        self._engine.eval()
        total = 0.0
        for start in range(0, len(samples), micro):
            batch = samples[start : start + micro]
            total += float(self._engine.module(self._to_device(batch))) * len(batch)
        return total, len(samples)


class PipelineDriver:
    """One pipeline stage on this rank, under 1F1B.

    Losses are means over all data-parallel ranks, equal on every rank.
    """

    def __init__(self, engine: Any, to_device: ToDevice) -> None:
        self._engine, self._to_device = engine, to_device
        self._read: deque[torch.Tensor] = deque()  # inputs of micro-batches read ahead

    def step(self, batches: Iterable[np.ndarray]) -> float:
        """One optimizer step."""
        return float(self._engine.train_batch(self._inputs_and_labels(batches)))

    def loss_so_far(self) -> torch.Tensor | None:
        """Mean loss of the step's micro-batches, on the last pipeline stage."""
        from megagrow.engine.deepspeed.privates import pipeline_loss  # imports DeepSpeed

        return pipeline_loss(self._engine)

    def evaluate(self, samples: np.ndarray, *, micro: int) -> tuple[float, int]:
        """Sum of losses, in equal batches: all data ranks must have the same number of samples.

        Raises:
            ConfigError: this rank gets no samples.
        """
        if len(samples) == 0:
            raise ConfigError(
                "train.validation_samples is too small for the pipeline layout",
                expected="at least one sample for each data-parallel rank",
                fix="set train.validation_samples to a multiple of the data-parallel size",
            )
        size = max(n for n in range(1, micro + 1) if len(samples) % n == 0)
        batches = np.split(samples, len(samples) // size)
        # The stages agreed on the activation shape of the last micro-batches; these may be smaller.
        self._engine.reset_activation_shape()
        loss = self._engine.eval_batch(
            self._inputs_and_labels(batches), num_micro_batches=len(batches)
        )
        self._engine.reset_activation_shape()
        return float(loss) * len(samples), len(samples)

    def _inputs_and_labels(
        self, batches: Iterable[np.ndarray] | Sequence[np.ndarray]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pairs = self._pairs(batches)
        if self._engine.module.separator is not None:
            self._read.clear()
            self._engine.module.tokens = self._tokens(pairs)
        return pairs

    def _pairs(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in batches:
            samples = self._to_device(batch)
            inputs = samples[:, :-1].contiguous()
            if self._engine.module.separator is not None:
                self._read.append(inputs)
            yield inputs, samples[:, 1:].contiguous()

    def _tokens(self, pairs: Iterator[Any]) -> Iterator[torch.Tensor]:
        """The inputs of each micro-batch, in the order of the forward passes."""
        while True:
            if not self._read:  # a stage between the ends, for which DeepSpeed reads none
                next(pairs)
            yield self._read.popleft()


def validation_share(count: int, *, data_rank: int, data_size: int, equal: bool) -> range:
    """Which of `count` validation samples a data-parallel rank takes.

    Args:
        equal: whether every rank must take equally many.

    Raises:
        ConfigError: equal shares are required and the samples do not divide evenly.
    """
    if equal and count % data_size:
        raise ConfigError(
            "train.validation_samples: a pipeline validates in equal parts",
            found=f"{count} samples, data-parallel size {data_size}",
            expected=f"a multiple of {data_size}",
            fix=f"set train.validation_samples={math.ceil(count / data_size) * data_size}",
        )
    return range(count * data_rank // data_size, count * (data_rank + 1) // data_size)
