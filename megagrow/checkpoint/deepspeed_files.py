"""The files of one step that DeepSpeed's engine saved: which there are, and what lies where.

The order of parameters in a flat partition is taken from the files, not from our own arithmetic,
so that parameters of models that are not ours are found as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.directory import READING, RESTORE, naming
from megagrow.checkpoint.pickles import Opaque, StoredTensor
from megagrow.checkpoint.torchfile import TorchFile, read_torch_file
from megagrow.errors import CheckpointError
from megagrow.layout import Layout
from megagrow.state.catalog import MASTER, Slot

MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MOMENTS = (
    Slot("exp_avg", "first_moment"),
    Slot("exp_avg_sq", "second_moment"),
    Slot("momentum_buffer", "first_moment"),
)


@dataclass(frozen=True)
class Piece:
    """A stretch of a parameter as a model-parallel rank has it: elements [start, stop)."""

    name: str
    slot: str
    mp: int
    start: int
    stop: int
    tensor: StoredTensor
    offset: int  # where it begins in the tensor, in elements


class Tag:
    """The files of one saved step, their pickles read.

    Attributes:
        shapes: by model-parallel rank, the shape of each parameter there, by its module name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, TorchFile] = {}
        with naming(path, "cannot be read", READING):
            listed = sorted(entry.name for entry in path.iterdir())
        self._models = {(int(m[2]), int(m[1] or 0)): n for n in listed if (m := MODEL.fullmatch(n))}
        self._layers = {(int(m[2]), int(m[1])): n for n in listed if (m := LAYER.fullmatch(n))}
        self._optims = {(int(m[2]), int(m[1])): n for n in listed if (m := OPTIM.fullmatch(n))}
        self.head = self._dictionary(self._models.get((0, 0), "mp_rank_00_model_states.pt"))
        self.model_parallel = self._count("mp_world_size")
        degrees = self.head.get("checkpoint_parallel_dimensions")
        tensor = degrees.get("tp_degree") if isinstance(degrees, dict) else None
        if not isinstance(tensor, int) or tensor < 1:
            tensor = len({t for t, _ in self._layers}) or self.model_parallel
        self.zero = self._stage()
        self.layout = Layout(
            data=self._count("dp_world_size"),
            tensor=tensor,
            pipeline=self.model_parallel // tensor,
            zero=self.zero,
        )
        self._require_all()
        self.shapes = [dict(self._shapes(mp)) for mp in range(self.model_parallel)]

    def pieces(self, order: Sequence[Sequence[Sequence[str]]]) -> Iterator[Piece]:
        """Every piece of every slot, replicas included.

        Args:
            order: for ZeRO 0, by model-parallel rank the names in each parameter group.
        """
        for mp in range(self.model_parallel):
            yield from self._partitions(mp) if self.zero else self._whole(mp, order[mp])

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Masters, and the moments that every state has."""
        states = [s for m in range(self.model_parallel) for s in self._states(self._saved(m, 0))]
        held = [
            slot
            for slot in MOMENTS
            if states and all(isinstance(state.get(slot.name), StoredTensor) for state in states)
        ]
        return (MASTER, *held)

    @property
    def decayed(self) -> dict[str, bool]:
        """Whether weight decay acts on a parameter, where the files tell it."""
        decay: dict[str, bool] = {}
        for mp in range(self.model_parallel) if self.zero else ():
            groups = self._dictionary(self._models[mp, 0])["param_shapes"]
            told = self._groups(self._saved(mp, 0))
            if len(told) == len(groups):
                for group, options in zip(groups, told, strict=True):
                    decay |= dict.fromkeys(group, bool(options.get("weight_decay")))
        return decay

    @property
    def optimizer(self) -> dict[str, Any]:
        """AdamW's settings as a configuration has them, of the first group that decays."""
        groups = self._groups(self._saved(0, 0))
        decaying = [group for group in groups if group.get("weight_decay")] or groups
        if not decaying or not {"betas", "eps", "lr"} <= set(decaying[0]):
            return {}
        told = {key: float(decaying[0][key]) for key in ("eps", "weight_decay", "lr")}
        told["lr"] /= float(decaying[0].get("lr_factor", 1.0))
        if told["lr"] == 0.0:  # a schedule's, not the run's
            del told["lr"]
        return {"betas": [float(beta) for beta in decaying[0]["betas"]], **told}

    @property
    def optimizer_step(self) -> int | None:
        """Updates done, as the optimizer counts them, where it was saved."""
        states = self._states(self._saved(0, 0))
        step = states[0].get("step") if states else None
        if isinstance(step, StoredTensor):
            return int(step.item())
        return step if isinstance(step, int) else None

    # --- which files ----------------------------------------------------------------------

    def _stage(self) -> int:
        if not self._optims:
            if self.head.get("param_shapes") is not None:
                raise self.fault("its *_optim_states.pt files are missing")
            return 0
        stage = self._optim(*min(self._optims)).get("zero_stage", 1)  # BF16_Optimizer tells none
        if isinstance(stage, Opaque) and stage.args:
            stage = stage.args[0]
        if stage not in (1, 2, 3):
            raise self.fault("zero_stage", f"{stage!r:.40}", "1, 2 or 3")
        return int(stage)

    def _require_all(self) -> None:
        ranks, data = range(self.model_parallel), range(self.layout.data)
        if self.layout.tensor * self.layout.pipeline != self.model_parallel:
            raise self.fault("parallel sizes", self.layout, f"{self.model_parallel} model ranks")
        each = data if self.zero == 3 else range(1)
        wanted = {"model_states": ([(m, d) for m in ranks for d in each], self._models)}
        wanted["optim_states"] = ([(m, d) for m in ranks for d in data], self._optims)
        for kind, (expected, found) in wanted.items():
            if (self.zero or kind == "model_states") and sorted(expected) != sorted(found):
                missing = sorted(set(expected) - set(found)) or sorted(set(found) - set(expected))
                raise self.fault(
                    f"{kind} files do not make up one checkpoint",
                    f"(model, data) rank {missing[0]} missing or too many of {len(found)} files",
                    f"one of each of {len(expected)} ranks",
                )
        for key in self._models:
            value = self._dictionary(self._models[key])
            for what in ("global_steps", "dp_world_size", "mp_world_size"):
                if value.get(what) != self.head.get(what):
                    raise self.fault(
                        f"{self._models[key]} is of another save: {what}",
                        f"{value.get(what)!r:.40}",
                        f"{self.head.get(what)!r:.40}",
                    )
        if self.head.get("frozen_param_shapes"):
            raise self.fault("has parameters that the optimizer does not train")

    def _shapes(self, mp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        groups = self._dictionary(self._models[mp, 0]).get("param_shapes")
        if groups is None:
            for name, tensor in self._module(mp).items():
                yield name, tensor.shape
            return
        for group in groups:
            for name, shape in group.items():
                yield name, tuple(shape)

    def _module(self, mp: int) -> dict[str, StoredTensor]:
        """Parameters of a rank by module name; a tied one under its first name alone."""
        module = self._dictionary(self._models[mp, 0]).get("module")
        if module is None:
            first, stop = self._stage_layers(mp)
            module = {
                f"{place}.{name}": tensor
                for place in range(first, stop)
                for name, tensor in self._dictionary(
                    self._layers.get((mp % self.layout.tensor, place), f"layer_{place:02d}-...")
                ).items()
            }
        buffers = set(self._dictionary(self._models[mp, 0]).get("buffer_names") or ())
        found: dict[tuple[Path, int], str] = {}  # the layers of a pipeline are files of their own
        tensors = {}
        for name, tensor in module.items():
            if isinstance(tensor, StoredTensor) and name not in buffers:
                at = tensor.path, tensor.start
                first_name = found.setdefault(at, name) if tensor.numel else name
                if first_name == name:
                    tensors[name] = tensor
        return tensors

    def _stage_layers(self, mp: int) -> tuple[int, int]:
        """The layers of a rank's pipeline stage, which nothing but the optimizer tells.

        A stage has as many parameters as its optimizer; a group of one parameter of one element
        stands in for a group of another stage.
        """
        tensor = mp % self.layout.tensor
        counts = [
            len(self._dictionary(name)) for (t, _), name in self._layers.items() if t == tensor
        ]
        first = 0
        for stage in range(mp // self.layout.tensor + 1):
            left = sum(map(len, self._members(stage * self.layout.tensor + tensor)))
            stop = first
            while left > 0 and stop < len(counts):
                left -= counts[stop]
                stop += 1
            if left or stop == first:
                raise self.fault(f"parameters of pipeline stage {stage} do not fill layers")
            if stage == mp // self.layout.tensor:
                break
            first = stop
        return first, stop

    # --- values ---------------------------------------------------------------------------

    def _partitions(self, mp: int) -> Iterator[Piece]:
        """Pieces in the flat partitions that ZeRO cuts."""
        groups = self._dictionary(self._models[mp, 0])["param_shapes"]
        data, sizes = self.layout.data, [0] * len(groups)
        for rank in range(data):
            saved = self._saved(mp, rank)
            key = "fp32_flat_groups" if self.zero == 3 else "single_partition_of_fp32_groups"
            flats, states = saved.get(key), self._states(saved)
            if not isinstance(flats, list) or len(flats) != len(groups):
                raise self.fault(f"{self._optims[mp, rank]} lacks {key}")
            paddings = saved.get("param_alignment_paddings")
            for g, (group, flat) in enumerate(zip(groups, flats, strict=True)):
                if rank == 0:
                    # The last rank's padding is not saved; with one rank it is the first as well.
                    sizes[g] = flat.numel
                    if data == 1:
                        sizes[g] += (saved.get("group_paddings") or [0] * len(groups))[g]
                if not group:  # it stands in for one that other pipeline stages have
                    continue
                gaps = paddings[g] if paddings else [0] * len(group)
                held = {MASTER.name: flat, **(states[g] if states else {})}
                for slot in self.slots:
                    for name, start, stop, offset in self._cuts(group, gaps, sizes[g], rank):
                        yield Piece(name, slot.name, mp, start, stop, held[slot.name], offset)

    def _cuts(
        self, group: Mapping[str, Any], gaps: Sequence[int], size: int, rank: int
    ) -> Iterator[tuple[str, int, int, int]]:
        """What a data rank has of a group: (name, start, stop, offset in the partition)."""
        position = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            numel = math.prod(shape)
            if self.zero == 3:
                part = -(-numel // self.layout.data)
                start, stop, offset = part * rank, min(part * (rank + 1), numel), position
                position += part
            else:
                low, high = max(position, size * rank), min(position + numel, size * (rank + 1))
                start, stop, offset = low - position, high - position, low - size * rank
                position += numel + gap
            if start < stop:
                yield name, start, stop, offset

    def _whole(self, mp: int, order: Sequence[Sequence[str]]) -> Iterator[Piece]:
        """Pieces of ZeRO 0: whole parameters, and states by their number in the optimizer."""
        module, saved = self._module(mp), self._saved(mp, 0)
        masters: list[StoredTensor] = [t for group in saved.get("fp32_groups", ()) for t in group]
        states = self._states(saved)
        if not states:
            for name, tensor in module.items():
                yield Piece(name, MASTER.name, mp, 0, tensor.numel, tensor, 0)
            return
        index = 0
        for group, members in zip(order, self._members(mp, stand_ins=True), strict=True):
            for place in range(len(members)):
                if group:
                    name = group[place]
                    master = masters[index] if masters else module[name]
                    for slot in self.slots:
                        tensor = master if slot == MASTER else states[index][slot.name]
                        if tensor.shape != module[name].shape:
                            raise self.fault(f"optimizer state {index} is not that of {name}")
                        yield Piece(name, slot.name, mp, 0, tensor.numel, tensor, 0)
                index += 1

    # --- what the dictionaries say --------------------------------------------------------

    def _saved(self, mp: int, data: int) -> dict[str, Any]:
        """What the optimizer saved; empty where it saved nothing."""
        if not self.zero:
            return self._dictionary(self._models[mp, 0]).get("optimizer") or {}
        return self._optim(mp, data)

    def _optim(self, mp: int, data: int) -> dict[str, Any]:
        saved = self._dictionary(self._optims[mp, data]).get("optimizer_state_dict")
        if not isinstance(saved, dict):
            raise self.fault(f"{self._optims[mp, data]} holds no optimizer state")
        return saved

    @staticmethod
    def _base(saved: Mapping[str, Any]) -> Any:
        """The state of the torch optimizer inside DeepSpeed's."""
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            if key in saved:
                return saved[key]
        return saved

    def _groups(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        base = self._base(saved)
        return list(base.get("param_groups", ())) if isinstance(base, dict) else []

    def _states(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The optimizer's state of each of its tensors, in its order."""
        base = self._base(saved)
        if isinstance(base, list):  # "elastic" checkpoints
            return base
        states = base.get("state", {})
        order = [i for group in self._groups(saved) for i in group["params"]]
        return [states[i] for i in order] if states else []

    def _members(self, mp: int, *, stand_ins: bool = False) -> list[list[int]]:
        """The optimizer's tensors, by group, of a rank of ZeRO 0."""
        saved = self._saved(mp, 0)
        states = self._base(saved).get("state", {})

        def stands_in(group: Sequence[int]) -> bool:
            moment = states.get(group[0], {}).get("exp_avg")
            return len(group) == 1 and isinstance(moment, StoredTensor) and moment.shape == (1,)

        members = [list(group["params"]) for group in self._groups(saved)]
        return [m if stand_ins or not stands_in(m) else [] for m in members]

    def _count(self, key: str) -> int:
        value = self.head.get(key)
        if type(value) is not int or not 0 < value < 1 << 20:
            raise self.fault(key, f"{value!r:.40}", "a number of ranks")
        return value

    def _dictionary(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            self.files[name] = read_torch_file(self.path / name)
        value = self.files[name].value
        if not isinstance(value, dict):
            raise self.fault(f"{name} holds no dictionary", type(value).__name__)
        return value

    def fault(self, what: str, found: object = None, expected: object = None) -> CheckpointError:
        """An error that names this checkpoint."""
        return CheckpointError(f"{self.path}: {what}", found=found, expected=expected, mend=RESTORE)
