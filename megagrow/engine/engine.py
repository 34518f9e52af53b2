"""One growth stage's engine: a model under DeepSpeed, whose state can be read and written."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import deepspeed
import numpy as np
import torch
from torch import nn

from megagrow import ops
from megagrow.config import Config, LayoutConfig, ModelConfig
from megagrow.config.batch import accumulation
from megagrow.config.optimization import OptimizerConfig
from megagrow.engine.comm import Comm
from megagrow.engine.deepspeed import privates
from megagrow.engine.deepspeed.config import deepspeed_config
from megagrow.engine.deepspeed.drivers import Driver, PipelineDriver, PlainDriver, validation_share
from megagrow.engine.deepspeed.loss_scale import LossScale, get_loss_scale, set_loss_scale
from megagrow.engine.deepspeed.pipeline import PipelinedModel
from megagrow.engine.deepspeed.publish import publish
from megagrow.engine.frozen import FrozenParameters
from megagrow.engine.groups import Groups, ModelParallelUnit
from megagrow.engine.optimizers.blockwise import BlockAdamW, BlockLion, BlockOptimizer
from megagrow.engine.optimizers.clipping import GradientClipper
from megagrow.engine.optimizers.muon import BlockMuon
from megagrow.engine.precision import Precisions, precisions
from megagrow.engine.probe import Probe
from megagrow.engine.state import LiveState, fill_with_nan, held_shards, live_state, shared_tensors
from megagrow.growth.diagnostics import Watched
from megagrow.growth.operators.ramp import Ramp
from megagrow.growth.optimizer_rules import FROZEN, GroupKey, OptimizerRules
from megagrow.models.common.documents import Separator
from megagrow.models.common.masks import Masks, ramp_in
from megagrow.models.common.parallel import TensorParallel, seed_random_numbers
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.placement import PLACEHOLDER, Placement
from megagrow.state.precision import PRECISIONS


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    Attributes:
        loss: mean loss in nats: of this data rank, or with a pipeline of all data ranks.
        grad_norm: global gradient norm before clipping.
        applied: False if the update was skipped: fp16 gradients overflowed, or `accept` said no.
    """

    loss: float
    grad_norm: float
    applied: bool


# Given the mean loss over all ranks and the gradient norm: whether to apply the update.
Accept = Callable[[float, float], bool]


class Engine:
    """A model on a layout under DeepSpeed.

    When created, its parameters are NaN and its optimizer state is zero: a transfer into
    `state`, followed by `publish`, makes it ready.

    Args:
        config: the run.
        model: the model configuration of this growth stage.
        spread: the parallelism settings of this growth stage.
        placement: who holds what.
        rules: per-tensor rules that earlier growths left to the optimizer.
        optimizer_step: the step count that the optimizer continues from.
        eod: id of the end token, if documents of a sample do not see each other.
        ramp: of new units that are being faded in; `set_progress` then sets how far they are.
        loss_scale: the previous engine's, for fp16.
        comm: the processes.

    Raises:
        ConfigError: the model does not divide over the layout, or a setting clashes.
    """

    def __init__(
        self,
        *,
        config: Config,
        model: ModelConfig,
        spread: LayoutConfig,
        placement: Placement,
        rules: OptimizerRules,
        optimizer_step: int,
        eod: int | None = None,
        ramp: Ramp | None = None,
        loss_scale: LossScale | None = None,
        comm: Comm,
    ) -> None:
        ops.choose(config.ops.backend)
        self.model, self.placement, self.comm = model, placement, comm
        self.layout = layout = placement.layout
        self.accumulation = accumulation(config.batch, layout)
        self.coordinates = layout.coordinates(comm.rank)
        self.slots = config.optimizer.kind.slots
        groups = comm.groups(layout)
        parallel = groups.tensor_parallel(sequence=spread.sequence_parallel)

        dtype = PRECISIONS[config.precision.dtype].dtype
        self.separator = Separator.of(model, eod, device=comm.device, dtype=dtype)
        module, every = self._build_module(dtype, groups, parallel, ramp)
        parameters = {name: p for name, p in every.items() if p.requires_grad}
        numel = sum(parameter.numel() for parameter in parameters.values())
        settings = deepspeed_config(
            config, layout, parameters=numel, sequence_parallel=parallel.splits_sequence
        )
        self.precisions = precisions(
            settings,
            optimizer=config.optimizer.kind,
            gpu=comm.device.type == "cuda",
        )
        self._optimizer = _make_optimizer(
            config.optimizer,
            self.precisions,
            _parameter_groups(config, placement, self.coordinates.pipe, every, module),
        )
        self._clipper: GradientClipper | None = None
        if layout.zero == 0 and config.precision.dtype == "fp32":
            values = list(parameters.values())
            self._clipper = GradientClipper(
                values, groups, config.optimizer.grad_clip, device=comm.device
            )
            self._optimizer.before_step = self._clipper
        self._deepspeed = self._start_deepspeed(settings, module, groups)
        self._driver: Driver = (PipelineDriver if layout.pipeline > 1 else PlainDriver)(
            self._deepspeed, self._on_device
        )
        offloaded = config.optimizer.offload == "cpu"
        self._frozen = FrozenParameters(
            {name: p for name, p in every.items() if not p.requires_grad},
            placement,
            groups,
            device=torch.device("cpu") if offloaded else comm.device,
        )
        self.state: LiveState = live_state(
            engine=self._deepspeed,
            parameters=parameters,
            frozen=self._frozen.fragments,
            placement=placement,
            rank=comm.rank,
            slots=self.slots,
            rules=rules,
            optimizer_step=optimizer_step,
        )
        if isinstance(self._optimizer, BlockMuon):
            self._optimizer.set_matrices(
                shared_tensors(
                    engine=self._deepspeed,
                    parameters=parameters,
                    placement=placement,
                    rank=comm.rank,
                    rules=rules,
                ),
                collect=partial(groups.add_shards, zero=layout.zero),
                device=comm.device,
            )
        set_loss_scale(self._deepspeed, loss_scale or {})
        self._accept: Accept | None = None
        self._verdict: bool | None = None
        self._optimizer.accept = self._accepted

    def _build_module(
        self, dtype: torch.dtype, groups: Groups, parallel: TensorParallel, ramp: Ramp | None
    ) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """This rank's part of the model, uninitialised, and its parameters by logical name."""
        module: nn.Module
        with torch.device(self.comm.device):
            if self.layout.pipeline > 1:
                module = PipelinedModel(
                    self.model,
                    cuts=self.placement.cuts,
                    parallel=parallel,
                    groups=groups,
                    separator=self.separator,
                )
            else:
                module = Transformer(self.model, parallel, self.separator)
        module.to(dtype)
        parameters = named_tensors(module)
        catalog = self.placement.catalog
        for name, parameter in parameters.items():
            parameter.requires_grad_(catalog[name].training == "trained")
        # DeepSpeed copies what it trains, and at ZeRO 3 all parameters.
        zero = self.layout.zero
        fill_with_nan([p for p in parameters.values() if p.requires_grad], shared=zero > 0)
        fill_with_nan([p for p in parameters.values() if not p.requires_grad], shared=zero == 3)
        self._masks: Masks | None = None
        if ramp is not None:
            self._masks = ramp_in(module, self.model, ramp.old, parallel=parallel)
        for name, parameter in parameters.items():
            if self.placement.is_split(catalog[name]):
                privates.mark_split(parameter)
        return module, parameters

    def _start_deepspeed(self, settings: dict[str, Any], module: nn.Module, groups: Groups) -> Any:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        privates.forget_last_groups()
        privates.allow_ranks_without_gradients()
        plain = self.layout.tensor == 1 or self.layout.pipeline > 1
        with privates.lean_start():
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self._optimizer,
                config=settings,
                mpu=None if plain else ModelParallelUnit(groups),
                dist_init_required=False,
            )
        if self.layout.data == 1 and self.layout.zero == 0:
            privates.skip_gradient_average(engine)
        if self.layout.pipeline > 1:
            privates.end_backward_at(engine, lowest=self.placement.lowest_trained_stage)
        return engine

    def publish(self) -> None:
        """Copy the master weights in `state` into the model's parameters."""
        self._frozen.publish()
        publish(self._deepspeed)

    def set_progress(self, progress: float) -> None:
        """Under a ramp, set the weight of the new units from now on: 0 to 1."""
        if self._masks is not None:
            self._masks.set(progress)

    @property
    def loss_scale(self) -> LossScale:
        """State of dynamic loss scaling; empty if it is off."""
        return get_loss_scale(self._deepspeed)

    def train_step(
        self,
        batches: Iterable[np.ndarray],
        *,
        lr: float,
        seed: int,
        accept: Accept | None = None,
        probe: Probe | None = None,
    ) -> StepResult:
        """One optimizer step.

        Args:
            batches: this data rank's micro-batches, each [micro, sequence + 1] token ids.
            lr: the run's learning rate for this update.
            seed: seeds the step's random numbers (dropout), independent of earlier steps; the
                same on all ranks of a tensor-parallel group.
            accept: called on every rank, with the same numbers, before the update is applied.
            probe: observes the update.
        """
        self._optimizer.probe = probe
        seed_random_numbers(seed, self.comm.device)
        self._accept, self._verdict = accept, None
        self._optimizer.set_learning_rate(lr)
        loss = self._driver.step(batches)
        self._optimizer.probe = None
        applied = self._deepspeed.was_step_applied() and self._verdict is not False
        return StepResult(loss, self._grad_norm(), applied=applied)

    def probe(self, watched: Sequence[Watched]) -> Probe:
        """A probe of one update of these matrices, for `train_step`."""
        shards = held_shards(
            engine=self._deepspeed,
            parameters=named_tensors(self._deepspeed.module),
            placement=self.placement,
            rank=self.comm.rank,
            names=[one.tensor.name for one in watched],
        )
        return Probe(watched, shards, device=self.comm.device)

    def _grad_norm(self) -> float:
        if self._clipper is not None:
            return self._clipper.norm
        norm = privates.grad_norm(self._deepspeed)
        return norm if norm >= 0 else math.inf

    def _accepted(self) -> bool:
        """Under ZeRO the optimizer asks once per parameter group; cache one answer per step."""
        if self._verdict is None and self._accept is None:
            self._verdict = math.isfinite(self._grad_norm())
        elif self._verdict is None and self._accept is not None:
            loss = self._driver.loss_so_far()
            mine = [0.0, 0.0] if loss is None else [float(loss), 1.0]
            total, count = map(sum, zip(*self.comm.gather_rows(mine), strict=True))
            self._verdict = self._accept(total / count, self._grad_norm())
        return bool(self._verdict)

    def evaluate(self, samples: np.ndarray, *, micro: int) -> tuple[float, int]:
        """Sum of the losses (nats per token) over this data rank's share, and their number.

        Args:
            samples: all validation samples, [n, sequence + 1] token ids.
            micro: maximum number of samples in one forward pass.
        """
        share = validation_share(
            len(samples),
            data_rank=self.coordinates.data,
            data_size=self.layout.data,
            equal=self.layout.pipeline > 1,
        )
        return self._driver.evaluate(samples[share.start : share.stop], micro=micro)

    def close(self) -> LiveState:
        """Tear down the engine but keep its state, for a transfer into the next one."""
        self._deepspeed.destroy()
        for parameter in self._deepspeed.module.parameters():
            parameter.grad = None
        del self._deepspeed, self._optimizer, self._driver, self._clipper, self._frozen
        gc.collect()
        if self.comm.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.state

    def _on_device(self, batch: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(batch, dtype=np.int64)).to(self.comm.device)


def _make_optimizer(
    config: OptimizerConfig, formats: Precisions, groups: list[dict[str, Any]]
) -> BlockOptimizer:
    """The optimizer (KeyError if it is none of `_OPTIMIZERS`)."""
    return _OPTIMIZERS[config.name](config, formats, groups)


def _make_adamw(
    config: OptimizerConfig, formats: Precisions, groups: list[dict[str, Any]]
) -> BlockOptimizer:
    return BlockAdamW(groups, betas=config.betas)


def _make_lion(
    config: OptimizerConfig, formats: Precisions, groups: list[dict[str, Any]]
) -> BlockOptimizer:
    return BlockLion(groups, betas=config.betas)


def _make_muon(
    config: OptimizerConfig, formats: Precisions, groups: list[dict[str, Any]]
) -> BlockOptimizer:
    return BlockMuon(
        groups,
        betas=config.betas,
        momentum=config.momentum,
        iteration=PRECISIONS[formats.newton_schulz or "fp32"].dtype,
    )


# One for each of `state.optimizers.OPTIMIZERS`, by name (a test compares them).
_OPTIMIZERS = {"adamw": _make_adamw, "lion": _make_lion, "muon": _make_muon}


def _parameter_groups(
    config: Config,
    placement: Placement,
    stage: int,
    parameters: dict[str, nn.Parameter],
    module: nn.Module,
) -> list[dict[str, Any]]:
    """The optimizer's groups: the same number, in the same order, on every pipeline stage.

    DeepSpeed's ZeRO sums gradient norms over the stages group by group, so a stage that
    lacked a group would make the others hang; it gets a placeholder group holding a single zero.
    """
    here = dict(placement.groups(stage))
    every = {key for s in range(placement.layout.pipeline) for key, _ in placement.groups(s)}
    every.discard(FROZEN)
    sample = next(iter(parameters.values()))
    groups = []
    for number, key in enumerate(sorted(cast(set[GroupKey], every))):
        no_decay, lr, weight_decay, eps, orthogonal = key
        if orthogonal:
            lr *= (config.optimizer.muon_lr or config.optimizer.lr) / config.optimizer.lr
        names = [tensor.name for tensor in here.get(key, ())]
        members = [parameters[name] for name in names]
        if not members:
            members = [nn.Parameter(sample.new_zeros(1))]
            module.register_parameter(f"{PLACEHOLDER}{number}", members[0])
        groups.append(
            {
                "params": members,
                "lr_factor": lr,
                "weight_decay": 0.0 if no_decay else config.optimizer.weight_decay * weight_decay,
                "eps": config.optimizer.eps * eps,
                "orthogonal": orthogonal,
                "tensors": names,
            }
        )
    return groups
