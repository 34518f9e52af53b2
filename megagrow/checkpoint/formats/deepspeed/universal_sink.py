"""Plans DeepSpeed universal checkpoints; see `universal_source` for the format.

Hyperparameters of our own models are left out on purpose: the engine keeps its own.  Those of a
foreign engine are written for ZeRO 1 and 2; ZeRO 3 would apply the first group's to all.
DeepSpeed 0.19.8, on which this is based, lets all parameter groups of ZeRO 3 share one step
tensor after `load_universal`; an optimizer that increments it in place, as torch's do, then counts
once per group, unless each gets its own copy.  Untrained tensors are in the module of the model
file, which `load_universal` does not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.containers.torch_writer import plan_archive, whole_values
from megagrow.checkpoint.formats.deepspeed.file_plan import VERSION, DeepSpeedPlan
from megagrow.checkpoint.interface.format import FilePlan, SinkRequest, Values
from megagrow.checkpoint.io.files import naming, write_new
from megagrow.errors import ConfigError
from megagrow.state.boxes import whole
from megagrow.state.catalog import MASTER
from megagrow.state.placement import split_axis

LATEST = "latest_universal"


class UniversalSink:
    """The files of a universal checkpoint; of the layout only the pipeline matters."""

    def __init__(self, request: SinkRequest) -> None:
        self._plan = plan = DeepSpeedPlan(request)
        if plan.model is not None and plan.untrained("frozen"):
            raise ConfigError(
                "a universal checkpoint has no place for frozen parameters of megagrow's models",
                found=f"{len(plan.untrained('frozen'))} frozen tensors",
                fix="give --to-format deepspeed, native or dcp",
            )
        self.slots = plan.slots
        self._tag = f"global_step{request.step}_universal"
        self.files: list[FilePlan] = []
        layout = plan.layout
        groups = (plan.groups(stage) for stage in range(layout.pipeline))
        group_of = {t.name: g for each in groups for g, group in enumerate(each) for t in group}
        for tensor in (tensor for tensor in plan.catalog if tensor.training == "trained"):
            stages = plan.placement.stages(tensor)
            axis = split_axis(tensor)
            about = {
                "cat_dim": axis or 0,
                "vocab_tensor": axis is not None and tensor.axes[axis] == "vocab",
            }
            # A module lists a tied parameter once, a pipeline once on each of its stages.
            for name in (plan.module_names(tensor, stage)[0] for stage in stages):
                for slot in plan.slots:
                    values = Values(tensor.name, slot.name, whole(tensor.shape), torch.float32)
                    file = "fp32" if slot == MASTER else slot.name
                    self._add(f"zero/{name}/{file}", {"param": whole_values(values), **about})
                step = plan.state(group_of[tensor.name], tensor).get("step")
                if step is not None:
                    self._add(f"zero/{name}/step", step)
        self._add("zero/optimizer_state", self._optimizer_state())
        apart = {
            name: whole_values(Values(t.name, MASTER.name, whole(t.shape), plan.dtype_of(t)))
            for t in (*plan.untrained("frozen"), *plan.untrained("buffer"))
            for name in (t.name, *t.aliases)
        }
        for mp in range(layout.tensor * layout.pipeline):
            stage = mp // layout.tensor
            common = plan.common(plan.groups(stage), stage)
            state = {"module": apart or None, "optimizer": None, **common}
            for prefix in ("", "zero_pp_rank_0_"):  # either kind of engine reads its own
                self._add(f"{prefix}mp_rank_{mp:02d}_model_states", state)

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write the `latest_universal` file."""
        with naming(directory / LATEST, "cannot be written"):
            write_new(directory / LATEST, self._tag.encode())

    def _optimizer_state(self) -> dict[str, Any]:
        bare = [{"params": [index]} for index in range(len(self._plan.group_keys))]
        groups = bare
        if self._plan.engine is not None:
            groups = [self._plan.hyperparameters(i, [i]) for i in range(len(bare))]
        return {
            "loss_scaler": self._plan.loss_scaler(),
            "dynamic_loss_scale": self._plan.dtype == torch.float16,
            "overflow": False,
            **self._plan.clipping(),
            **self._plan.beside("dynamic_loss_scale", "overflow"),
            "param_groups": groups,  # for ZeRO 1 and 2; what follows is for ZeRO 3
            "optimizer_state_dict": {
                "state": {0: self._plan.state(0)},
                "param_groups": bare,
            },
            "ds_version": VERSION,
        }

    def _add(self, name: str, value: Any) -> None:
        self.files.append(plan_archive(f"{self._tag}/{name}.pt", value))
