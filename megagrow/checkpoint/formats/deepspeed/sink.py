"""Checkpoints that DeepSpeed's own engine loads, planned as files.

Everything is as `save_checkpoint` of DeepSpeed 0.19.8 would write it in the requested layout;
what its engine does not read is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.containers.pickle_reader import Opaque
from megagrow.checkpoint.containers.torch_writer import NewTensor, plan_archive
from megagrow.checkpoint.formats.deepspeed import names
from megagrow.checkpoint.formats.deepspeed.file_plan import VERSION, DeepSpeedPlan
from megagrow.checkpoint.interface.format import FilePlan, Segment, SinkRequest, Zeros
from megagrow.checkpoint.io.files import naming, write_new
from megagrow.state.catalog import MASTER, LogicalTensor, Slot
from megagrow.state.layout import Coordinates

_ALIGNMENT = 2  # of a group's flat buffer, times the number of data ranks


class DeepSpeedSink:
    """The files of `engine.save_checkpoint`."""

    def __init__(self, request: SinkRequest) -> None:
        self._plan = plan = DeepSpeedPlan(request)
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
                    parts = {"frozen_param_fragments": self._fragments(stage, rank, data)}
                    self._add(f"{prefix}{mp}_model_states.pt", {**state, **parts})
                for data in range(layout.data if layout.zero else 0):
                    bf16 = "bf16_" if plan.dtype == torch.bfloat16 else ""
                    at = Coordinates(pipe=stage, data=data, tensor=rank)
                    name = f"{bf16}zero_pp_rank_{data}_{mp}_optim_states.pt"
                    self._add(name, self._optim_states(at))

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write the `latest` file."""
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
            members = [t for group in groups for t in group]
            members += [*plan.untrained("frozen"), *plan.untrained("buffer")]
            module = self._parameters(members, stage, rank)
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
            shape, dtype = plan.local_shape(tensor), plan.dtype_of(tensor)
            if plan.layout.zero == 3 and tensor.training != "buffer":  # only in the partitions
                parameter = NewTensor(dtype, (0,), ())
            else:
                segments = tuple(plan.values(tensor, MASTER, rank, dtype=dtype))
                parameter = NewTensor(dtype, shape, segments)
            module |= dict.fromkeys(plan.module_names(tensor, stage), parameter)
        return module

    def _fragments(self, stage: int, rank: int, data: int) -> dict[str, NewTensor] | None:
        """Frozen parameters from ZeRO 2 on: whole, or a data rank's part of each."""
        plan, zero = self._plan, self._plan.layout.zero
        if zero < 2:
            return None
        made = {}
        for tensor in plan.untrained("frozen"):
            dtype, numel, shape = (
                plan.dtype_of(tensor),
                plan.numel(tensor),
                plan.local_shape(tensor),
            )
            start, stop = 0, numel
            if zero == 3:
                part = -(-numel // plan.layout.data)
                start, stop = min(part * data, numel), min(part * (data + 1), numel)
                shape = (part,)
            segments = list(plan.values(tensor, MASTER, rank, start=start, stop=stop, dtype=dtype))
            missing = math.prod(shape) - (stop - start)
            if missing:
                segments.append(Zeros(missing * dtype.itemsize))
            name = plan.module_names(tensor, stage)[0]
            made[name] = NewTensor(dtype, shape, tuple(segments))
        return made

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
        """ZeRO 0: torch's own optimizer, wrapped by DeepSpeed's in 16 bit."""
        plan = self._plan
        states: dict[int, dict[str, Any]] = {}
        masters: list[list[NewTensor]] = []
        stated = []
        count = 0
        for index, group in enumerate(groups):
            first = count
            masters.append([])
            for tensor in group:
                shape = plan.local_shape(tensor)
                made = [
                    NewTensor(torch.float32, shape, tuple(plan.values(tensor, slot, rank)))
                    for slot in plan.slots
                ]
                masters[-1].append(made[0])
                state = self._state(made[1:], plan.state(index, tensor))
                states |= {count: state} if state else {}
                count += 1
            if not group:  # the engine has a one-element parameter there
                nothing = NewTensor(torch.float32, (1,), (Zeros(4),))
                masters[-1].append(nothing)
                states[count] = self._state([nothing] * (len(plan.slots) - 1), plan.state(index))
                count += 1
            stated.append(plan.hyperparameters(index, range(first, count)))
        inner = {"state": states, "param_groups": stated}
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
        wrapped |= plan.beside(*wrapped)
        return {**wrapped, "optimizer_state_dict": inner, "fp32_groups": masters}

    def _state(self, moments: Sequence[NewTensor], numbers: dict[str, Any]) -> dict[str, Any]:
        slots = self._plan.slots[1:]
        named = {slot.name: moment for slot, moment in zip(slots, moments, strict=True)}
        return {**numbers, **named}

    def _optim_states(self, at: Coordinates) -> dict[str, Any]:
        """ZeRO 1 to 3: the flat partitions of one rank."""
        plan, zero, data = self._plan, self._plan.layout.zero, self._plan.layout.data
        groups = plan.groups(at.pipe)
        states: dict[int, dict[str, Any]] = {}
        masters, stated, paddings, slices = [], [], [], []
        for index, group in enumerate(groups):
            parts, size, padding = self._partition(group, at)
            made = []
            for slot in plan.slots:
                segments = list(self._flat(parts, slot, at.tensor, size))
                made.append(NewTensor(torch.float32, (size,), tuple(segments)))
            masters.append(made[0])
            state = self._state(made[1:], plan.state(index))
            states |= {index: state} if state else {}
            stated.append(plan.hyperparameters(index, [index]))
            paddings.append(padding)
            slices.append(
                {
                    plan.module_names(tensor, at.pipe)[0]: _fragment(stop - start, position)
                    for tensor, start, stop, position in parts
                }
            )
        inner = {"state": states, "param_groups": stated}
        stage = Opaque("deepspeed.runtime.zero.config.ZeroStageEnum", (zero,))
        saved: dict[str, Any] = {
            "loss_scaler": plan.loss_scaler(),
            "dynamic_loss_scale": plan.dtype == torch.float16,
            "overflow": False,
            "zero_stage": stage,
            "ds_version": VERSION,
        }
        saved |= plan.beside("dynamic_loss_scale", "overflow")
        if zero == 3:
            saved |= {
                "partition_count": data,
                "optimizer_state_dict": inner,
                "fp32_flat_groups": masters,
            }
        else:
            saved |= {
                **plan.clipping(),
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
            (tensor, start, stop, position) of each of its parts; its size; the padding that the
            format records. A group without members has one element on every stage.
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
