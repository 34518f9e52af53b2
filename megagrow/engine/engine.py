"""One growth stage's engine: a model under DeepSpeed, whose state can be read and written."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import numpy as np
import torch
from torch import nn

from megagrow.config import Config, ModelConfig
from megagrow.engine.comm import Comm
from megagrow.engine.ds_config import deepspeed_config
from megagrow.engine.fragments import publish
from megagrow.engine.optimizer import BlockAdamW
from megagrow.engine.state import LiveState, live_state
from megagrow.errors import ConfigError
from megagrow.growth.rules import GroupKey, OptimizerRules, group_keys
from megagrow.layout import Layout
from megagrow.model.catalog import build_catalog
from megagrow.model.transformer import Transformer, named_tensors
from megagrow.schedule.batch import accumulation
from megagrow.state.placement import Placement


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave: this rank's mean loss (nats) and the global gradient norm."""

    loss: float
    grad_norm: float


class Engine:
    """A model on a layout under DeepSpeed.

    Fresh, its parameters are NaN and its optimizer state is zero: a transfer into
    `state`, then `publish`, makes it ready.

    Args:
        config: the run.
        model: the shape of this growth stage's model.
        layout: the process grid of this growth stage.
        rules: what earlier growths left to the optimizer.
        optimizer_step: the step count that the optimizer goes on from.
        comm: the processes.
    """

    def __init__(
        self,
        *,
        config: Config,
        model: ModelConfig,
        layout: Layout,
        rules: OptimizerRules,
        optimizer_step: int,
        comm: Comm,
    ) -> None:
        _require_supported(layout)
        self.model, self.layout, self.comm = model, layout, comm
        self.accumulation = accumulation(config.batch, layout)
        self.grad_clip = config.optimizer.grad_clip
        catalog = build_catalog(model)
        keys = group_keys(catalog, rules)
        self.placement = Placement(catalog, layout, keys)
        self.coordinates = layout.coordinates(comm.rank)

        with torch.device(comm.device):
            module = Transformer(model)
        parameters = named_tensors(module)
        for parameter in parameters.values():
            # Whatever a transfer forgets to write stays NaN and stops the run at once.
            parameter.data.fill_(torch.nan)
        optimizer = BlockAdamW(
            _parameter_groups(config, self.placement, self.coordinates.pipe, parameters),
            betas=config.optimizer.betas,
        )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        numel = sum(parameter.numel() for parameter in parameters.values())
        self._deepspeed: Any
        self._deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(config, layout, parameters=numel),
            dist_init_required=False,
        )
        self._optimizer = optimizer
        self.state: LiveState = live_state(
            engine=self._deepspeed,
            parameters=parameters,
            placement=self.placement,
            rank=comm.rank,
            rules=rules,
            optimizer_step=optimizer_step,
        )

    def publish(self) -> None:
        """Bring the parameters that the model computes with up to date with `state`."""
        publish(self._deepspeed)

    def train_step(self, batches: Iterable[np.ndarray], *, lr: float, seed: int) -> StepResult:
        """One optimizer step.

        Args:
            batches: this data rank's micro-batches, each [micro, sequence + 1] token ids.
            lr: the run's learning rate for this update.
            seed: of the step's random numbers (dropout), which no earlier step influences.
        """
        torch.manual_seed(seed)
        self._optimizer.set_learning_rate(lr)
        self._deepspeed.train()
        losses = []
        norm = 0.0
        for batch in batches:
            loss = self._deepspeed(self._on_device(batch))
            self._deepspeed.backward(loss)
            losses.append(loss.detach())
            if self.layout.zero == 0 and len(losses) == self.accumulation:
                norm = self._clip()
            self._deepspeed.step()
        if self.layout.zero:
            norm = float(self._deepspeed.get_global_grad_norm() or 0.0)
        return StepResult(loss=float(torch.stack(losses).mean()), grad_norm=norm)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[np.ndarray]) -> tuple[float, int]:
        """Sum of the losses of this rank's samples (nats per token), and their number."""
        self._deepspeed.eval()
        total, count = 0.0, 0
        for batch in batches:
            total += float(self._deepspeed.module(self._on_device(batch))) * len(batch)
            count += len(batch)
        return total, count

    def close(self) -> LiveState:
        """Take the engine down but keep its state, for a transfer into the next one."""
        self._deepspeed.destroy()
        for parameter in self._deepspeed.module.parameters():
            parameter.grad = None
        del self._deepspeed, self._optimizer
        gc.collect()
        if self.comm.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.state

    def _on_device(self, batch: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(batch, dtype=np.int64)).to(self.comm.device)

    def _clip(self) -> float:
        """Clip the gradients of an engine without ZeRO; returns their norm before that."""
        bound = self.grad_clip or float("inf")
        return float(nn.utils.clip_grad_norm_(self._deepspeed.module.parameters(), bound))


def _parameter_groups(
    config: Config, placement: Placement, stage: int, parameters: dict[str, nn.Parameter]
) -> list[dict[str, Any]]:
    groups = []
    for key, tensors in placement.groups(stage):
        no_decay, lr, weight_decay, eps = cast(GroupKey, key)
        groups.append(
            {
                "params": [parameters[tensor.name] for tensor in tensors],
                "lr_factor": lr,
                "weight_decay": 0.0 if no_decay else config.optimizer.weight_decay * weight_decay,
                "eps": config.optimizer.eps * eps,
            }
        )
    return groups


def _require_supported(layout: Layout) -> None:
    for name, size in (("tensor", layout.tensor), ("pipeline", layout.pipeline)):
        if size != 1:
            raise ConfigError(
                f"layout.{name}: the training engine runs data parallel only in this version",
                found=size,
                expected=1,
                mend=f"set layout.{name}=1",
            )
