"""Shared by the DeepSpeed sinks: names, groups and the optimizer's numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megagrow.checkpoint.containers.pickle_reader import Opaque
from megagrow.checkpoint.containers.torch_writer import number, size_of
from megagrow.checkpoint.formats.deepspeed import names
from megagrow.checkpoint.formats.deepspeed.engine_state import EngineState
from megagrow.checkpoint.interface.client_state import FROZEN, KEY, plain_json
from megagrow.checkpoint.interface.format import Segment, SinkRequest, Values, Zeros
from megagrow.checkpoint.interface.model_of import (
    optimizer_of,
    recorded_model,
    refuse_ramp,
    section,
)
from megagrow.checkpoint.interface.placed import placed
from megagrow.config.optimization import PrecisionConfig
from megagrow.errors import ConfigError
from megagrow.state.boxes import flat_range_boxes
from megagrow.state.catalog import MASTER, LogicalTensor, Slot, Training
from megagrow.state.placement import split_axis
from megagrow.state.precision import PRECISIONS

VERSION = "0.19.8"  # the DeepSpeed version whose files these are


class DeepSpeedPlan:
    """Shared by the DeepSpeed sinks: names, groups and the optimizer's numbers.

    Raises:
        ConfigError: the state cannot be laid out as requested.
    """

    def __init__(self, request: SinkRequest) -> None:
        self.request, meta = request, request.meta
        self.layout, self.catalog = meta.layout, meta.catalog
        self.placement = placed(meta.catalog, request)
        refuse_ramp(meta, program="DeepSpeed")
        self.model = recorded_model(meta)
        if self.model is None and self.layout.tensor * self.layout.pipeline > 1:
            raise ConfigError(
                "DeepSpeed's files of a model that is not ours cannot be cut",
                found=f"tensor {self.layout.tensor}, pipeline {self.layout.pipeline}",
                fix="give --tensor 1 --pipeline 1",
            )
        if self.model is not None and self.untrained("frozen") and self.layout.pipeline > 1:
            raise ConfigError(
                "DeepSpeed's files of a pipeline do not tell frozen parameters from others",
                found=f"{len(self.untrained('frozen'))} frozen tensors, pipeline "
                f"{self.layout.pipeline}",
                fix="give --pipeline 1, or --to-format native or dcp",
            )
        self.optimizer = optimizer_of(meta)
        self.precision = section(PrecisionConfig, meta.config.get("precision"))
        self.dtype = request.dtype or PRECISIONS[self.precision.dtype].dtype
        held = {slot.name for slot in meta.slots}
        self.engine = EngineState.of(meta) if self.model is None else None
        # The engine expects its optimizer's full state, of every tensor, since a group is one flat
        # tensor; what the source lacks starts at zero.
        kept_of_all = (replace(slot, matrices=True) for slot in self.optimizer.kind.slots)
        self.slots: tuple[Slot, ...] = tuple(kept_of_all)
        moments = {slot.name for slot in self.slots[1:]}
        if self.engine is not None:  # a foreign engine has its own optimizer
            kept = self.engine.slots
            self.slots = (MASTER, *(slot for slot in meta.slots if slot.name in kept))
        self.fresh = self.engine is None and not moments & held
        self.optimizer_step = 0 if self.fresh else self._recorded_step()
        self.group_keys: list[Hashable] = sorted(self._keys())  # type: ignore[type-var]

    def _keys(self) -> set[Hashable]:
        """Keys of the optimizer's groups that have trained members."""
        if self.engine is not None:
            return set(range(len(self.engine.groups)))
        stages = range(self.layout.pipeline)
        return {key for p in stages for key, group in self.placement.groups(p) if _trained(group)}

    def _recorded_step(self) -> int:
        stated = self.request.meta.run_state.get("optimizer_step")
        return stated if isinstance(stated, int) else self.request.step

    @property
    def last(self) -> int:
        """The head's index in the layer list."""
        return self.model.layers + 1 if self.model else -1

    def module_names(self, tensor: LogicalTensor, stage: int) -> list[str]:
        """A tensor's names in the module of a pipeline stage; a tied one has several."""
        if self.model is None:
            return [tensor.name, *tensor.aliases]
        cuts, pipelined = self.placement.cuts, self.layout.pipeline > 1
        return [
            names.module_name(tensor.name, place, self.last, pipelined=pipelined)
            for place in tensor.places
            if cuts[stage] <= place < cuts[stage + 1]
        ]

    def groups(self, stage: int) -> list[list[LogicalTensor]]:
        """The optimizer's groups on a stage; a group is empty if only other stages have members."""
        if self.engine is not None:
            return [[self.catalog[name] for name in g.tensors] for g in self.engine.groups]
        here = dict(self.placement.groups(stage))
        return [_trained(here.get(key, [])) for key in self.group_keys]

    def untrained(self, training: Training) -> list[LogicalTensor]:
        """The frozen parameters, or the buffers, which our own models do not have."""
        return [tensor for tensor in self.catalog if tensor.training == training]

    def dtype_of(self, tensor: LogicalTensor) -> torch.dtype:
        """A tensor's element type in the module."""
        return self.dtype if tensor.training == "trained" else self.stored_dtype(tensor)

    def stored_dtype(self, tensor: LogicalTensor) -> torch.dtype:
        """The element type of an untrained tensor: its own unless another is requested."""
        return self.request.dtype_of(tensor.name, MASTER.name)

    def state(self, index: int, tensor: LogicalTensor | None = None) -> dict[str, Any]:
        """The numbers in the state of a group's tensor, or of the group as one flat tensor."""
        if self.engine is not None:
            return self.engine.state(index, tensor.name if tensor else None)
        return {"step": number(self.optimizer_step)}

    def local_shape(self, tensor: LogicalTensor) -> tuple[int, ...]:
        """The shape of a rank's part of a tensor, padding included."""
        return self.placement.local(tensor, 0).shape

    def numel(self, tensor: LogicalTensor) -> int:
        """Its number of elements."""
        return math.prod(self.local_shape(tensor))

    def values(
        self,
        tensor: LogicalTensor,
        slot: Slot,
        rank: int,
        *,
        start: int = 0,
        stop: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Segment]:
        """Elements [start, stop) of a tensor-parallel rank's part; padding is zeros."""
        local = self.placement.local(tensor, rank)
        valid = local.box.relative_to(local.box.offset)
        stop = local.numel if stop is None else stop
        for box, _ in flat_range_boxes(local.shape, start, stop):
            kept = box.intersect(valid)
            if kept is not None:
                where = kept.moved_by(local.box.offset)
                yield Values(tensor.name, slot.name, where, dtype)
            missing = box.volume - (kept.volume if kept else 0)
            if missing:
                yield Zeros(missing * dtype.itemsize)

    def hyperparameters(self, index: int, params: Sequence[int]) -> dict[str, Any]:
        """A parameter group as torch's AdamW saves it, or as the engine's own optimizer did."""
        if self.engine is not None:
            return self.engine.options(index, params)
        key = self.group_keys[index]
        no_decay, lr, decay, eps = key[:4] if isinstance(key, tuple) else (False, 1.0, 1.0, 1.0)
        ours = self.optimizer
        return {
            "lr_factor": lr,
            "weight_decay": 0.0 if no_decay else ours.weight_decay * decay,
            "eps": ours.eps * eps,
            "lr": ours.lr * lr,
            "betas": tuple(ours.betas),
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": True,
            "params": list(params),
        }

    def common(
        self, groups: Sequence[Sequence[LogicalTensor]] | None, stage: int
    ) -> dict[str, Any]:
        """The entries of every model_states file besides parameters and optimizer state."""
        meta, layout = self.request.meta, self.layout
        shapes = [
            {self.module_names(t, stage)[0]: size_of(self.local_shape(t)) for t in group}
            for group in groups or ()
        ]
        shared = {
            other: first
            for group in groups or ()
            for tensor in group
            for first, *others in [self.module_names(tensor, stage)]
            for other in others
        }
        stated = self.request.meta.run_state.get("consumed_samples")
        frozen = self.untrained("frozen")
        for tensor in frozen if groups is not None else ():
            first, *others = self.module_names(tensor, stage)
            shared |= dict.fromkeys(others, first)
        apart = groups is not None and layout.zero > 1
        head = {} if self.engine is None else dict(self.engine.head)
        return {
            "buffer_names": [tensor.name for tensor in self.untrained("buffer")],
            "param_shapes": None if groups is None else shapes,
            "frozen_param_shapes": {
                self.module_names(t, stage)[0]: size_of(self.local_shape(t)) for t in frozen
            }
            if apart
            else None,
            "shared_params": shared,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": self.request.step,
            "global_samples": stated if isinstance(stated, int) else 0,
            "dp_world_size": layout.data,
            "mp_world_size": layout.tensor * layout.pipeline,
            "checkpoint_parallel_dimensions": {
                "pp_degree": layout.pipeline,
                "tp_degree": layout.tensor,
            },
            "universal_checkpoint_info": self.merging(),
            **head,
            "ds_config": {"zero_optimization": {"stage": layout.zero}},
            "ds_version": VERSION,
            KEY: {
                "step": self.request.step,
                "config": plain_json(meta.config),
                "run_state": plain_json(meta.run_state),
                "fingerprints": plain_json(meta.fingerprints),
                FROZEN: [tensor.name for tensor in frozen],
            },
        }

    def merging(self) -> dict[str, Any]:
        """Name patterns that say how DeepSpeed's own converter joins tensor-parallel shards.

        Unlisted names are joined along the first axis; a list must not contain absent names.
        """
        lists: dict[str, set[str]] = {
            "tp_replicated_parameter_patterns": set(),
            "parameter_with_row_parallelism_patterns": set(),
            "vocabulary_parameter_patterns": set(),
        }
        rows = 0
        for tensor in self.catalog:
            axis = split_axis(tensor)
            places = {
                re.sub(r"\d+", r"\\d+", re.escape(name)) + "$"
                for stage in self.placement.stages(tensor)
                for name in self.module_names(tensor, stage)[:1]
            }
            if axis is None:
                lists["tp_replicated_parameter_patterns"] |= places
            elif axis == 1:
                lists["parameter_with_row_parallelism_patterns"] |= places
            elif tensor.axes[axis] == "vocab":
                lists["vocabulary_parameter_patterns"] |= places
                rows = tensor.shape[axis]
        patterns = {key: sorted(found) for key, found in lists.items() if found}
        return {"universal_checkpoint_version": 0.4, "original_vocab_size": rows, **patterns}

    def loss_scaler(self) -> Opaque:
        """DeepSpeed's own loss scaler object."""
        kept = self.engine and self.engine.loss_scaler()
        if kept:
            return kept
        room = "deepspeed.runtime.fp16.loss_scaler"
        if self.dtype != torch.float16:
            return Opaque(f"{room}.LossScaler", state={"cur_scale": 1.0, "dynamic": False})
        scale = self.loss_scale()
        state = {
            "cur_scale": scale["cur_scale"],
            "dynamic": True,
            "cur_iter": int(scale["cur_iter"]),
            "last_overflow_iter": int(scale["last_overflow_iter"]),
            "scale_factor": 2.0,
            "scale_window": self.precision.window,
            "min_scale": 1,
            "delayed_shift": 2,
            "cur_hysteresis": int(scale["cur_hysteresis"]),
            "consecutive_hysteresis": False,
            "raise_error_at_min_scale": True,
            "dtype": None,
        }
        return Opaque(f"{room}.DynamicLossScaler", state=state)

    def loss_scale(self) -> dict[str, float]:
        """The state of fp16 dynamic loss scaling; the run's own if it has any."""
        start = 2.0**self.precision.initial_scale_power
        first = {"cur_scale": start, "cur_iter": 0, "last_overflow_iter": -1, "cur_hysteresis": 2}
        stated = self.request.meta.run_state.get("loss_scale")
        if self.engine is not None:
            stated = {key: value for key, value in self._engine_numbers().items() if key in first}
        return first | (dict(stated) if isinstance(stated, Mapping) else {})

    def _engine_numbers(self) -> dict[str, Any]:
        """The numbers that the engine saved outside its optimizer, including its loss scaler's."""
        saved = {} if self.engine is None else dict(self.engine.saved)
        _, scaler = saved.pop("loss_scaler", None) or (None, {})
        return {**scaler, **saved}

    def clipping(self) -> dict[str, float]:
        """The maximum gradient norm; omitted if an engine's is unknown: it keeps its own."""
        ours = {} if self.engine is not None else {"clip_grad": self.optimizer.grad_clip}
        return ours | self.beside("clip_grad")

    def beside(self, *keys: str) -> dict[str, Any]:
        """The requested ones of these numbers, as far as they are known."""
        stated = self._engine_numbers()
        return {key: stated[key] for key in keys if key in stated}


def _trained(group: Sequence[LogicalTensor]) -> list[LogicalTensor]:
    return [tensor for tensor in group if tensor.training == "trained"]
