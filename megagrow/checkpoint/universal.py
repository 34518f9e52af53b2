"""DeepSpeed's universal checkpoints, which its engine loads with `load_universal`.

    <tag>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt   whole parameters, one directory each
    <tag>/zero/optimizer_state.pt                              what is not of one parameter
    <tag>/[zero_pp_rank_0_]mp_rank_MM_model_states.pt          counters; with the prefix for ZeRO 3
    latest_universal                                           the tag

Its engine cuts a parameter over any number of data-parallel ranks, and over tensor-parallel ones
along the axis that `cat_dim` names.  Parameters bear the names that they have in the module, so
a pipeline loads what was written for a pipeline, a plain module what was written for one.
Hyperparameters are left out on purpose: the engine keeps its own, where it would else give the
first group's weight decay to all (ZeRO 3).  DeepSpeed 0.19.8, from which this was read, lets all
parameter groups of ZeRO 3 share one step tensor after `load_universal`; an optimizer that counts
up in place, as torch's do, then counts once for each group, unless each gets a copy of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint import deepspeed_names as names
from megagrow.checkpoint.adapter import FilePlan, Format, Request, Source, Values
from megagrow.checkpoint.archive import number, plan_archive, whole_values
from megagrow.checkpoint.deepspeed import client_state
from megagrow.checkpoint.deepspeed_files import MODEL, MOMENTS
from megagrow.checkpoint.deepspeed_plan import VERSION, Plan
from megagrow.checkpoint.directory import READING, RESTORE, laid_out, naming, write_new
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.pickles import StoredTensor
from megagrow.checkpoint.shape import replayed_model
from megagrow.checkpoint.stored import Record, StoredBox, StoredSource
from megagrow.checkpoint.torchfile import TorchFile, read_torch_file
from megagrow.errors import CheckpointError
from megagrow.layout import Layout
from megagrow.model.catalog import build_catalog
from megagrow.state.boxes import whole
from megagrow.state.catalog import MASTER
from megagrow.state.placement import split_axis

_LATEST = "latest_universal"
_FILES = {"fp32": MASTER, **{slot.name: slot for slot in MOMENTS}}


class UniversalSink:
    """The files of a universal checkpoint; of the layout it takes the pipeline alone."""

    def __init__(self, request: Request) -> None:
        self._plan = plan = Plan(request)
        self.slots = plan.slots
        self._tag = f"global_step{request.step}_universal"
        self.files: list[FilePlan] = []
        layout = plan.layout
        for tensor in plan.catalog:
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
                self._add(f"zero/{name}/step", number(plan.optimizer_step))
        self._add("zero/optimizer_state", self._optimizer_state())
        for mp in range(layout.tensor * layout.pipeline):
            stage = mp // layout.tensor
            state = {"module": None, "optimizer": None, **plan.common(plan.groups(stage), stage)}
            for prefix in ("", "zero_pp_rank_0_"):  # either kind of engine looks for its own
                self._add(f"{prefix}mp_rank_{mp:02d}_model_states", state)

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write the name of the tag."""
        with naming(directory / _LATEST, "cannot be written"):
            write_new(directory / _LATEST, self._tag.encode())

    def _optimizer_state(self) -> dict[str, Any]:
        groups = [{"params": [index]} for index in range(len(self._plan.group_keys))]
        return {
            "loss_scaler": self._plan.loss_scaler(),
            "dynamic_loss_scale": self._plan.dtype == torch.float16,
            "overflow": False,
            "clip_grad": self._plan.optimizer.grad_clip,
            "param_groups": groups,  # of ZeRO 1 and 2; what follows is of ZeRO 3
            "optimizer_state_dict": {
                "state": {0: {"step": number(self._plan.optimizer_step)}},
                "param_groups": groups,
            },
            "ds_version": VERSION,
        }

    def _add(self, name: str, value: Any) -> None:
        self.files.append(plan_archive(f"{self._tag}/{name}.pt", value))


def open_source(path: Path) -> Source:
    """Open a tag's directory, or the one above it.

    Raises:
        CheckpointError: missing, damaged, hostile, or laid out in another way.
    """
    with laid_out(path, "a universal checkpoint of DeepSpeed 0.19"):
        return _open(find(path) or path)


def _open(path: Path) -> Source:
    with naming(path, "cannot be read", READING):
        modules = sorted(entry.name for entry in (path / "zero").iterdir() if entry.is_dir())
        heads = sorted(entry.name for entry in path.iterdir() if MODEL.fullmatch(entry.name))
    if not modules or not heads:
        raise _fault(path, "has no parameters" if heads else "has no *_model_states.pt")
    head = read_torch_file(path / heads[0]).value
    told = client_state(head)
    shapes = {n: tuple(s) for group in head.get("param_shapes") or () for n, s in group.items()}
    files: dict[str, TorchFile] = {}
    held: dict[str, dict[str, StoredTensor]] = {}
    for module in modules:
        held[module] = {}
        for file, slot in _FILES.items():
            name = f"zero/{module}/{file}.pt"
            if (path / name).exists():
                files[name] = read_torch_file(path / name)
                held[module][slot.name] = _payload(path, name, files[name].value)
    slots = [s for s in _FILES.values() if all(s.name in tensors for tensors in held.values())]
    if MASTER not in slots:
        raise _fault(path, "a parameter lacks its fp32.pt")

    last = names.last_place(modules)
    logical = {module: names.logical_name(module, last) or module for module in modules}
    local = {}
    for module, tensors in reversed(held.items()):
        shape = tensors[MASTER.name].shape
        # ZeRO 3's own are flat; the model's file knows their shapes.
        flat = len(shape) == 1 and math.prod(shapes.get(module, ())) == shape[0]
        local[logical[module]] = shapes[module] if flat else shape
    rows = local["embedding.token"][0] if "embedding.token" in local else None
    written = replayed_model(told["config"], told["run_state"], vocabulary=rows)
    model = written or names.recognised_model(local, tensor=1)
    catalog = build_catalog(model) if model else None
    if written is not None and catalog and {t.name: t.shape for t in catalog} != local:
        raise _fault(path, "its client state describes another model than its parameters are")
    if catalog is None or {t.name: t.shape for t in catalog} != local:
        model, logical = None, {module: module for module in modules}
        catalog = names.plain_catalog(
            {module: tensors[MASTER.name].shape for module, tensors in held.items()}, {}
        )
    boxes: dict[tuple[str, str], StoredBox] = {}
    for module, tensors in held.items():
        tensor = catalog[logical[module]]
        for slot in slots:
            stored = tensors[slot.name]
            if stored.numel != tensor.volume:
                raise _fault(path, f"{module}: {slot.name} has another size", stored.numel)
            boxes.setdefault(
                (tensor.name, slot.name),
                StoredBox(
                    tensor.name,
                    slot.name,
                    whole(tensor.shape),
                    stored.path.relative_to(path).as_posix(),
                    stored.start,
                    stored.dtype,
                ),
            )
    config = dict(told["config"])
    if model:
        config.setdefault("model", model.model_dump(mode="json", by_alias=True))
    used = sorted({box.file for box in boxes.values()})
    count = _step(path, modules[0])
    step = told["step"] if told["step"] is not None else int(head.get("global_steps") or 0)
    run_state = told["run_state"] or ({} if count is None else {"optimizer_step": count})
    return StoredSource(
        path,
        meta=CheckpointMeta(
            catalog, tuple(slots), Layout(zero=1), config, told["fingerprints"], run_state
        ),
        step=step,
        sizes={name: files[name].size for name in used},
        boxes=boxes.values(),
        records=[Record(name, *record) for name in used for record in files[name].records],
    )


def _payload(path: Path, name: str, value: Any) -> StoredTensor:
    tensor = value.get("param") if isinstance(value, dict) else value
    if not isinstance(tensor, StoredTensor):
        raise _fault(path, f"{name} holds no parameter", type(value).__name__)
    return tensor


def _step(path: Path, module: str) -> int | None:
    """The optimizer's count of updates."""
    file = path / "zero" / module / "step.pt"
    if file.exists():
        step = read_torch_file(file).value
    else:
        state = read_torch_file(path / "zero" / "optimizer_state.pt").value
        step = state.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step")
    if isinstance(step, StoredTensor):
        return int(step.item())
    return step if isinstance(step, int) else None


def _fault(path: Path, what: str, found: object = None) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", found=found, mend=RESTORE)


def find(path: Path) -> Path | None:
    """The tag's directory that a path means: itself, or the one that the latest file names."""
    if (path / "zero").is_dir():
        return path
    latest = path / _LATEST
    if latest.is_file() and latest.stat().st_size < 1000:
        named = path / latest.read_text(errors="replace").strip()
        if named.parent == path and (named / "zero").is_dir():
            return named
    return None


FORMAT = Format(
    name="universal",
    about="DeepSpeed's universal checkpoint, for load_universal",
    find=find,
    open_source=open_source,
    open_sink=UniversalSink,
    axes=("tensor", "pipeline"),
)
