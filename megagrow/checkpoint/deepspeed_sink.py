"""Checkpoints that DeepSpeed's own engine loads, planned as files.

Everything is as `save_checkpoint` of DeepSpeed 0.19.8 would have written it in the layout that
is asked for; what its engine does not look at is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint import deepspeed_names as names
from megagrow.checkpoint.adapter import FilePlan, Request, Segment, Values, Zeros
from megagrow.checkpoint.archive import NewTensor, number, plan_archive, size_of
from megagrow.checkpoint.directory import naming, write_new
from megagrow.checkpoint.native_sink import placed
from megagrow.checkpoint.pickles import Opaque
from megagrow.config.schema import OptimizerConfig, PrecisionConfig
from megagrow.errors import ConfigError
from megagrow.layout import Coordinates
from megagrow.state.boxes import flat_range_boxes
from megagrow.state.catalog import ADAM_SLOTS, MASTER, LogicalTensor, Slot
from megagrow.state.placement import split_axis

VERSION = "0.19.8"  # of the DeepSpeed whose files these are
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ALIGNMENT = 2  # of a group's flat buffer, times the number of data ranks


class Plan:
    """What the sinks of DeepSpeed's formats have in common: names, groups, what to call things.

    Raises:
        ConfigError: the state cannot be laid out as asked for.
    """

    def __init__(self, request: Request) -> None:
        self.request, meta = request, request.meta
        self.layout, self.catalog = meta.layout, meta.catalog
        self.placement = placed(meta.catalog, request)
        self.model = names.described_model(meta.config, meta.catalog)
        if self.model is None and self.layout.tensor * self.layout.pipeline > 1:
            raise ConfigError(
                "DeepSpeed's files of a model that is not ours cannot be cut",
                found=f"tensor {self.layout.tensor}, pipeline {self.layout.pipeline}",
                mend="give --tensor 1 --pipeline 1",
            )
        self.optimizer = section(OptimizerConfig, meta.config.get("optimizer"))
        self.precision = section(PrecisionConfig, meta.config.get("precision"))
        self.dtype = request.dtype or DTYPES[self.precision.dtype]
        held = {slot.name for slot in meta.slots}
        moments = {slot.name for slot in ADAM_SLOTS[1:]}
        # An engine wants all of Adam's state; what the source lacks starts at zero.
        self.slots: tuple[Slot, ...] = ADAM_SLOTS
        self.fresh = not moments & held
        self.optimizer_step = 0 if self.fresh else self._told_step()
        keys = {key for p in range(self.layout.pipeline) for key, _ in self.placement.groups(p)}
        self.group_keys: list[Hashable] = sorted(keys)  # type: ignore[type-var]

    def _told_step(self) -> int:
        told = self.request.meta.run_state.get("optimizer_step")
        return told if isinstance(told, int) else self.request.step

    @property
    def last(self) -> int:
        """The head's place in the layer list."""
        return self.model.layers + 1 if self.model else -1

    def module_names(self, tensor: LogicalTensor, stage: int) -> list[str]:
        """What the module of a pipeline stage calls a tensor; a tied one has two names."""
        if self.model is None:
            return [tensor.name]
        cuts, pipelined = self.placement.cuts, self.layout.pipeline > 1
        return [
            names.module_name(tensor.name, place, self.last, pipelined=pipelined)
            for place in tensor.places
            if cuts[stage] <= place < cuts[stage + 1]
        ]

    def groups(self, stage: int) -> list[list[LogicalTensor]]:
        """The optimizer's groups on a stage; empty where other stages alone have members."""
        here = dict(self.placement.groups(stage))
        return [here.get(key, []) for key in self.group_keys]

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
        """A parameter group as torch's AdamW saves it."""
        key = self.group_keys[index]
        no_decay, lr, decay, eps = key if isinstance(key, tuple) else (False, 1.0, 1.0, 1.0)
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
        """What every model_states file has besides parameters and optimizer state."""
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
        told = self.request.meta.run_state.get("consumed_samples")
        return {
            "buffer_names": [],
            "param_shapes": None if groups is None else shapes,
            "frozen_param_shapes": None,
            "shared_params": shared,
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": self.request.step,
            "global_samples": told if isinstance(told, int) else 0,
            "dp_world_size": layout.data,
            "mp_world_size": layout.tensor * layout.pipeline,
            "checkpoint_parallel_dimensions": {
                "pp_degree": layout.pipeline,
                "tp_degree": layout.tensor,
            },
            "universal_checkpoint_info": self.merging(),
            "ds_config": {"zero_optimization": {"stage": layout.zero}},
            "ds_version": VERSION,
            names.CLIENT: {
                "step": self.request.step,
                "config": plain_json(meta.config),
                "run_state": plain_json(meta.run_state),
                "fingerprints": plain_json(meta.fingerprints),
            },
        }

    def merging(self) -> dict[str, Any]:
        """How DeepSpeed's own converter joins the parts of tensor-parallel ranks, by patterns.

        What is in no list is joined along the first axis; a list must not name what is not there.
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
        """DeepSpeed's own object for the scale of the loss."""
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
        """The numbers of fp16's dynamic loss scaling, the run's own where it has any."""
        start = 2.0**self.precision.initial_scale_power
        first = {"cur_scale": start, "cur_iter": 0, "last_overflow_iter": -1, "cur_hysteresis": 2}
        told = self.request.meta.run_state.get("loss_scale")
        return first | (dict(told) if isinstance(told, Mapping) else {})


class DeepSpeedSink:
    """The files of `engine.save_checkpoint`."""

    def __init__(self, request: Request) -> None:
        self._plan = plan = Plan(request)
        self.slots = plan.slots
        self._tag = f"global_step{request.step}"
        layout = plan.layout
        self.files: list[FilePlan] = []
        for stage in range(layout.pipeline):
            for rank in range(layout.tensor):
                mp = f"mp_rank_{stage * layout.tensor + rank:02d}"
                if layout.pipeline > 1:
                    self.files += self._layer_files(stage, rank)
                state = self._model_states(stage, rank)
                copies = layout.data if layout.zero == 3 else 1
                for data in range(copies):
                    prefix = f"zero_pp_rank_{data}_" if layout.zero == 3 else ""
                    self._add(f"{prefix}{mp}_model_states.pt", state)
                for data in range(layout.data if layout.zero else 0):
                    bf16 = "bf16_" if plan.dtype == torch.bfloat16 else ""
                    at = Coordinates(pipe=stage, data=data, tensor=rank)
                    name = f"{bf16}zero_pp_rank_{data}_{mp}_optim_states.pt"
                    self._add(name, self._optim_states(at))

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write the name of the tag."""
        with naming(directory / "latest", "cannot be written"):
            write_new(directory / "latest", self._tag.encode())

    def _add(self, name: str, value: Any) -> None:
        self.files.append(plan_archive(f"{self._tag}/{name}", value))

    # --- model_states ---------------------------------------------------------------------

    def _model_states(self, stage: int, rank: int) -> dict[str, Any]:
        plan = self._plan
        groups = plan.groups(stage)
        zero = plan.layout.zero
        module = None
        if plan.layout.pipeline == 1:
            module = self._parameters([t for group in groups for t in group], stage, rank)
        optimizer = None if zero else self._whole_states(groups, rank)
        return {
            "module": module,
            "optimizer": optimizer,
            **plan.common(groups if zero else None, stage),
        }

    def _parameters(
        self, tensors: Sequence[LogicalTensor], stage: int, rank: int
    ) -> dict[str, NewTensor]:
        plan = self._plan
        module: dict[str, NewTensor] = {}
        for tensor in tensors:
            shape = plan.local_shape(tensor)
            if plan.layout.zero == 3:  # the parameters are in the partitions alone
                parameter = NewTensor(plan.dtype, (0,), ())
            else:
                segments = tuple(plan.values(tensor, MASTER, rank, dtype=plan.dtype))
                parameter = NewTensor(plan.dtype, shape, segments)
            module |= dict.fromkeys(plan.module_names(tensor, stage), parameter)
        return module

    def _layer_files(self, stage: int, rank: int) -> Iterator[FilePlan]:
        plan = self._plan
        cuts = plan.placement.cuts
        for place in range(cuts[stage], cuts[stage + 1]):
            layer = {}
            for tensor in plan.catalog:
                if place in tensor.places:
                    segments = tuple(plan.values(tensor, MASTER, rank, dtype=plan.dtype))
                    name = names.layer_name(tensor.name, place, plan.last)
                    layer[name] = NewTensor(plan.dtype, plan.local_shape(tensor), segments)
            yield plan_archive(
                f"{self._tag}/layer_{place:02d}-model_{rank:02d}-model_states.pt", layer
            )

    # --- optimizer state ------------------------------------------------------------------

    def _whole_states(self, groups: Sequence[Sequence[LogicalTensor]], rank: int) -> dict[str, Any]:
        """ZeRO 0: torch's own optimizer, in 16 bit inside DeepSpeed's."""
        plan = self._plan
        states: dict[int, dict[str, NewTensor]] = {}
        masters: list[list[NewTensor]] = []
        told = []
        for index, group in enumerate(groups):
            first = len(states)
            masters.append([])
            for tensor in group:
                shape = plan.local_shape(tensor)
                made = [
                    NewTensor(torch.float32, shape, tuple(plan.values(tensor, slot, rank)))
                    for slot in plan.slots
                ]
                masters[-1].append(made[0])
                states[len(states)] = self._state(made[1:])
            if not group:  # the engine has one parameter of one element there
                nothing = NewTensor(torch.float32, (1,), (Zeros(4),))
                masters[-1].append(nothing)
                states[len(states)] = self._state([nothing, nothing])
            told.append(plan.hyperparameters(index, range(first, len(states))))
        inner = {"state": states, "param_groups": told}
        if plan.dtype == torch.float32:
            return inner
        dynamic = plan.dtype == torch.float16
        scale = plan.loss_scale() if dynamic else {"cur_scale": 1.0, "cur_iter": 0}
        wrapped: dict[str, Any] = {
            "dynamic_loss_scale": dynamic,
            "cur_scale": scale["cur_scale"],
            "cur_iter": int(scale["cur_iter"]),
        }
        if dynamic:
            wrapped["last_overflow_iter"] = int(scale["last_overflow_iter"])
            wrapped |= {"scale_factor": 2.0, "scale_window": plan.precision.window}
        return {**wrapped, "optimizer_state_dict": inner, "fp32_groups": masters}

    def _state(self, moments: Sequence[NewTensor]) -> dict[str, NewTensor]:
        slots = self._plan.slots[1:]
        named = {slot.name: moment for slot, moment in zip(slots, moments, strict=True)}
        return {"step": number(self._plan.optimizer_step), **named}

    def _optim_states(self, at: Coordinates) -> dict[str, Any]:
        """ZeRO 1 to 3: the flat partitions of one rank."""
        plan, zero, data = self._plan, self._plan.layout.zero, self._plan.layout.data
        groups = plan.groups(at.pipe)
        masters, states, told, paddings, slices = [], {}, [], [], []
        for index, group in enumerate(groups):
            parts, size, padding = self._partition(group, at)
            made = []
            for slot in plan.slots:
                segments = list(self._flat(parts, slot, at.tensor, size))
                made.append(NewTensor(torch.float32, (size,), tuple(segments)))
            masters.append(made[0])
            states[index] = self._state(made[1:])
            told.append(plan.hyperparameters(index, [index]))
            paddings.append(padding)
            slices.append(
                {
                    plan.module_names(tensor, at.pipe)[0]: _fragment(stop - start, position)
                    for tensor, start, stop, position in parts
                }
            )
        inner = {"state": states, "param_groups": told}
        stage = Opaque("deepspeed.runtime.zero.config.ZeroStageEnum", (zero,))
        saved: dict[str, Any] = {
            "loss_scaler": plan.loss_scaler(),
            "dynamic_loss_scale": plan.dtype == torch.float16,
            "overflow": False,
            "zero_stage": stage,
            "ds_version": VERSION,
        }
        if zero == 3:
            saved |= {
                "partition_count": data,
                "optimizer_state_dict": inner,
                "fp32_flat_groups": masters,
            }
        else:
            saved |= {
                "clip_grad": self._plan.optimizer.grad_clip,
                "base_optimizer_state": inner,
                "single_partition_of_fp32_groups": masters,
                "group_paddings": paddings,
                "param_alignment_paddings": [[0] * max(1, len(group)) for group in groups],
                "partition_count": [data] * len(groups),
                "param_slice_mappings": slices,
            }
        return {"optimizer_state_dict": saved, "ds_version": VERSION}

    def _partition(
        self, group: Sequence[LogicalTensor], at: Coordinates
    ) -> tuple[list[tuple[LogicalTensor, int, int, int]], int, int]:
        """A rank's flat partition of a group.

        Returns:
            (tensor, start, stop, position) of each of its parts; its size; the padding in it
            that the format tells of. A group without members has one element on every stage.
        """
        plan, data = self._plan, self._plan.layout.data
        parts, position = [], 0
        if plan.layout.zero == 3:
            for tensor in group:
                part = -(-plan.numel(tensor) // data)
                start = min(part * at.data, plan.numel(tensor))
                stop = min(start + part, plan.numel(tensor))
                parts.append((tensor, start, stop, position))
                position += part
            return parts, position, 0
        total = sum(map(plan.numel, group)) or 1
        size = -(-total // (_ALIGNMENT * data)) * _ALIGNMENT
        for tensor in group:
            numel = plan.numel(tensor)
            low, high = max(position, size * at.data), min(position + numel, size * (at.data + 1))
            if low < high:
                parts.append((tensor, low - position, high - position, low - size * at.data))
            position += numel
        return parts, size, size * data - total if at.data == data - 1 else 0

    def _flat(
        self,
        parts: Sequence[tuple[LogicalTensor, int, int, int]],
        slot: Slot,
        rank: int,
        size: int,
    ) -> Iterator[Segment]:
        filled = 0
        for tensor, start, stop, position in parts:
            if position > filled:
                yield Zeros((position - filled) * 4)
            yield from self._plan.values(tensor, slot, rank, start=start, stop=stop)
            filled = position + stop - start
        if size > filled:
            yield Zeros((size - filled) * 4)


def _fragment(numel: int, start: int) -> Opaque:
    room = "deepspeed.utils.tensor_fragment"
    return Opaque(f"{room}.fragment_address", state={"numel": numel, "start": start})


def section(kind: Any, data: Any) -> Any:
    """A section of a run's configuration, or its defaults where there is none that is valid."""
    try:
        return kind.model_validate(data)
    except ValueError:
        return kind()


def plain_json(value: Any) -> Any:
    """What JSON holds, with dictionaries and lists as such."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return value
