"""The files of one step that DeepSpeed's engine saved: which exist, and what each holds.

The order of parameters in a flat partition is read from the files, not computed from our own
rules, so parameters of foreign models are found as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megagrow.checkpoint.containers.pickle_reader import Opaque
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_reader import TorchFile, read_torch_file
from megagrow.checkpoint.formats.deepspeed.mapping import NAME as MAPPING
from megagrow.checkpoint.formats.deepspeed.saved_optimizer import Saved, SavedPiece, common_slots
from megagrow.checkpoint.interface.accounting import unread_files
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.checkpoint.io.files import READING, RESTORE, naming
from megagrow.errors import CheckpointError
from megagrow.state.catalog import MASTER, Slot
from megagrow.state.layout import Layout
from megagrow.state.precision import format_of

MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class Tag:
    """The files of one saved step, their pickles read.

    Attributes:
        shapes: by model-parallel rank, the shape of each parameter by module name: trained ones
            first, in the optimizer's order, then those known to be untrained.
        frozen: parameters that no optimizer trains, as far as ZeRO's files say.
        buffers: by model-parallel rank, its buffers.
        aliases: alternative names of a parameter, mapped to its main name.
        left_out: what the files hold and this class does not expose.
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
        self._seen: set[str] = set()  # names in the optimizers of a pipeline
        self.frozen: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.buffers: list[dict[str, StoredTensor]] = []
        kinds = (MODEL, LAYER, OPTIM)
        read = [name for name in listed if any(kind.fullmatch(name) for kind in kinds)]
        self.left_out: list[LeftOut] = list(unread_files(path, [MAPPING, *read]))
        self.shapes = [self._shapes(mp) for mp in range(self.model_parallel)]

    def pieces(self, order: Sequence[Sequence[Sequence[str]]]) -> Iterator[SavedPiece]:
        """Every piece of every slot, replicas included.

        Args:
            order: for ZeRO 0, by model-parallel rank the names in each parameter group.
        """
        for mp in range(self.model_parallel):
            trained = order[mp] if not self.zero else self.groups(mp)
            yield from self._partitions(mp) if self.zero else self._whole(mp, order[mp])
            module = self._module(mp)
            named = {name for group in trained for name in group}
            for name, shape in self.shapes[mp].items():
                if name not in named:
                    yield from self._frozen(mp, name, math.prod(shape), module)
            for name, buffer in self.buffers[mp].items():
                yield SavedPiece(name, MASTER.name, mp, 0, buffer.numel, buffer, 0)

    def groups(self, mp: int) -> list[list[str]]:
        """With ZeRO: the names in each parameter group of a rank, in partition order."""
        return [list(group) for group in self._dictionary(self._models[mp, 0])["param_shapes"]]

    def saved(self, mp: int) -> Saved:
        """What a model-parallel rank's optimizer saved, on its first data rank."""
        return Saved(self._saved(mp, 0))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Masters, and the moments present in every state."""
        return common_slots([self.saved(mp) for mp in range(self.model_parallel)])

    @property
    def precision(self) -> str | None:
        """The number format that the engine computes in; None if a run of ours cannot."""
        config = self.head.get("ds_config")
        for name in ("bf16", "fp16"):
            part = config.get(name) if isinstance(config, dict) else None
            if isinstance(part, dict) and part.get("enabled") is True:
                return name
        if any(name.startswith("bf16_") for name in self._optims.values()):
            return "bf16"
        trained = [t for n, t in self._module(0).items() if n not in self.frozen]
        if not trained:
            return "fp32"
        found = format_of(trained[0].dtype)
        return None if found is None else found.name

    @property
    def decayed(self) -> dict[str, bool]:
        """Whether each parameter has weight decay, where the files say."""
        decay: dict[str, bool] = {}
        for mp in range(self.model_parallel) if self.zero else ():
            groups, stated = self.groups(mp), self.saved(mp).groups
            if len(stated) == len(groups):
                for group, options in zip(groups, stated, strict=True):
                    decay |= dict.fromkeys(group, bool(options.get("weight_decay")))
        return decay

    @property
    def optimizer_step(self) -> int | None:
        """The optimizer's own step count, if it was saved."""
        states = self.saved(0).states
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
        stage = self._optim(*min(self._optims)).get("zero_stage", 1)  # BF16_Optimizer has none
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
                        f"{self._models[key]} is from another save: {what}",
                        f"{value.get(what)!r:.40}",
                        f"{self.head.get(what)!r:.40}",
                    )

    def _shapes(self, mp: int) -> dict[str, tuple[int, ...]]:
        """A rank's parameters; also records its buffers, frozen parameters and aliases."""
        head = self._dictionary(self._models[mp, 0])
        groups = head.get("param_shapes")
        trained = {n: tuple(shape) for group in groups or () for n, shape in group.items()}
        if groups is not None and head.get("module") is None:
            self._count_layers(mp, trained)
            self.buffers.append({})
            return trained
        names = set(head.get("buffer_names") or ())
        shared = head.get("shared_params") or self.head.get("shared_params") or {}
        stated = {n: tuple(shape) for n, shape in (head.get("frozen_param_shapes") or {}).items()}
        buffers, first, found = {}, dict[tuple[Path, int], str](), dict(trained)
        for name, tensor in self._stored(mp).items():
            at = tensor.path, tensor.start
            if name in names:
                buffers[name] = tensor
            elif name in shared or (tensor.numel and first.setdefault(at, name) != name):
                self.aliases[name] = shared.get(name) or first[at]
            elif name not in trained:
                found[name] = stated.get(name, tensor.shape)
                if groups is not None:
                    self.frozen.add(name)
        for name in [n for n, shape in found.items() if 0 in shape]:
            self.left_out.append(LeftOut(name, "it has no element"))
            del found[name]
            self.frozen.discard(name)
        for name in [n for n, tensor in buffers.items() if not tensor.numel]:
            self.left_out.append(LeftOut(name, "it has no element"))
            del buffers[name]
        for other, name in [(a, n) for a, n in self.aliases.items() if n in self.aliases]:
            self.aliases[other] = self.aliases[name]
        self.buffers.append(buffers)
        return found

    def _count_layers(self, mp: int, trained: Mapping[str, Any]) -> None:
        """With pipeline and ZeRO: check whether layers hold more than the trained parameters."""
        if mp % self.layout.tensor == 0:
            shared = self._dictionary(self._models[mp, 0]).get("shared_params") or {}
            self._seen |= {*trained, *shared}
        if mp + 1 < self.model_parallel:
            return
        for (tensor, place), file in self._layers.items():
            if tensor == 0:
                for name in self._dictionary(file):
                    if f"{place}.{name}" not in self._seen:
                        reason = "in a pipeline, untrained and tied tensors cannot be told apart"
                        self.left_out.append(LeftOut(f"{file}: {name}", reason))

    def _module(self, mp: int) -> dict[str, StoredTensor]:
        """A rank's parameters by module name; a tied one under its main name."""
        return {
            name: tensor
            for name, tensor in self._stored(mp).items()
            if name not in self.aliases and name in self.shapes[mp]
        }

    def _stored(self, mp: int) -> dict[str, StoredTensor]:
        """All tensors in a rank's module state."""
        module = self._dictionary(self._models[mp, 0]).get("module")
        if module is None and self.zero:
            return {}
        if module is None:
            first, stop = self._stage_layers(mp)
            module = {
                f"{place}.{name}": tensor
                for place in range(first, stop)
                for name, tensor in self._dictionary(
                    self._layers.get((mp % self.layout.tensor, place), f"layer_{place:02d}-...")
                ).items()
            }
        return {name: tensor for name, tensor in module.items() if isinstance(tensor, StoredTensor)}

    def _stage_layers(self, mp: int) -> tuple[int, int]:
        """The layers of a rank's pipeline stage, which only the optimizer reveals.

        A stage has as many parameters as its optimizer; a group of one parameter with one element
        is a placeholder for a group of another stage.
        """
        tensor = mp % self.layout.tensor
        counts = [
            len(self._dictionary(name)) for (t, _), name in self._layers.items() if t == tensor
        ]
        first = 0
        for stage in range(mp // self.layout.tensor + 1):
            left = sum(map(len, self.members(stage * self.layout.tensor + tensor)))
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

    def _partitions(self, mp: int) -> Iterator[SavedPiece]:
        """Pieces in ZeRO's flat partitions."""
        groups = self._dictionary(self._models[mp, 0])["param_shapes"]
        data, sizes = self.layout.data, [0] * len(groups)
        for rank in range(data):
            saved = self._saved(mp, rank)
            key = "fp32_flat_groups" if self.zero == 3 else "single_partition_of_fp32_groups"
            flats, states = saved.get(key), Saved(saved).states
            if not isinstance(flats, list) or len(flats) != len(groups):
                raise self.fault(f"{self._optims[mp, rank]} lacks {key}")
            paddings = saved.get("param_alignment_paddings")
            for g, (group, flat) in enumerate(zip(groups, flats, strict=True)):
                if rank == 0:
                    # The last rank's padding is not saved; with one rank it is the first as well.
                    sizes[g] = flat.numel
                    if data == 1:
                        sizes[g] += (saved.get("group_paddings") or [0] * len(groups))[g]
                if not group:  # a placeholder for a group of other pipeline stages
                    continue
                gaps = paddings[g] if paddings else [0] * len(group)
                held = {MASTER.name: flat, **(states[g] if states else {})}
                for slot in self.slots:
                    for name, start, stop, offset in self._cuts(group, gaps, sizes[g], rank):
                        yield SavedPiece(name, slot.name, mp, start, stop, held[slot.name], offset)

    def _cuts(
        self, group: Mapping[str, Any], gaps: Sequence[int], size: int, rank: int
    ) -> Iterator[tuple[str, int, int, int]]:
        """A data rank's parts of a group: (name, start, stop, offset in the partition)."""
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

    def _whole(self, mp: int, order: Sequence[Sequence[str]]) -> Iterator[SavedPiece]:
        """Pieces at ZeRO 0: whole parameters, and states by their index in the optimizer."""
        module, saved = self._module(mp), self.saved(mp)
        if not saved.members:
            for name, tensor in module.items():
                yield SavedPiece(name, MASTER.name, mp, 0, tensor.numel, tensor, 0)
            return
        for group, members in zip(order, saved.members, strict=True):
            for name, number in zip(group, members, strict=False):
                master = saved.masters[number] if saved.masters else module[name]
                for slot in self.slots:
                    tensor = master if slot == MASTER else saved.states[number][slot.name]
                    if tensor.shape != module[name].shape:
                        raise self.fault(f"optimizer state {number} is not that of {name}")
                    yield SavedPiece(name, slot.name, mp, 0, tensor.numel, tensor, 0)

    def _frozen(
        self, mp: int, name: str, numel: int, module: Mapping[str, StoredTensor]
    ) -> Iterator[SavedPiece]:
        """Pieces of a parameter that no optimizer trains; ZeRO 3 partitions it like the others."""
        if self.zero < 3:
            yield SavedPiece(name, MASTER.name, mp, 0, numel, module[name], 0)
            return
        part = -(-numel // self.layout.data)
        for rank in range(self.layout.data):
            kept = self._dictionary(self._models[mp, rank]).get("frozen_param_fragments") or {}
            start, stop = min(part * rank, numel), min(part * (rank + 1), numel)
            if not isinstance(kept.get(name), StoredTensor):
                raise self.fault(f"{self._models[mp, rank]} lacks its part of {name}")
            if start < stop:
                yield SavedPiece(name, MASTER.name, mp, start, stop, kept[name], 0)

    # --- what the dictionaries say --------------------------------------------------------

    def _saved(self, mp: int, data: int) -> dict[str, Any]:
        """What the optimizer saved; empty if it saved nothing."""
        if not self.zero:
            return self._dictionary(self._models[mp, 0]).get("optimizer") or {}
        return self._optim(mp, data)

    def _optim(self, mp: int, data: int) -> dict[str, Any]:
        saved = self._dictionary(self._optims[mp, data]).get("optimizer_state_dict")
        if not isinstance(saved, dict):
            raise self.fault(f"{self._optims[mp, data]} holds no optimizer state")
        return saved

    def members(self, mp: int) -> list[list[int]]:
        """The optimizer's tensor indices, by group, of a ZeRO 0 rank; empty for a placeholder."""
        saved, pipelined = self.saved(mp), self.layout.pipeline > 1
        return [
            [] if pipelined and len(group) == 1 and saved.shape_of(group[0]) == (1,) else group
            for group in saved.members
        ]

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
        return CheckpointError(f"{self.path}: {what}", found=found, expected=expected, fix=RESTORE)
