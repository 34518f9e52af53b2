"""Megatron-LM's classic checkpoints (`--ckpt-format torch`): a tensor x pipeline grid of pickles.

    iter_0000007/mp_rank_TT[_PPP]/model_optim_rng.pt    or release/mp_rank_...
    latest_checkpointed_iteration.txt                   the iteration, or `release`

Fused matrices have our order since checkpoint version 2.0: rows of QKV are [key/value group,
its queries + key + value, head width], of a SwiGLU input each rank has its part of the gate, then
of the other half.  Older versions have the axes of QKV in another order.  The token table is padded
to a multiple of `make_vocab_size_divisible_by` times the tensor-parallel size.  A tied table lies
on the first stage and, with a pipeline, again on the last.

Optimizer state is read and written where it is torch's or apex's Adam on whole parameters, inside
Megatron's 16-bit optimizer or bare.  That of its distributed optimizer lies in files of its own
and is left out.  For writing see `megatron_sink`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint import megatron_names as names
from megagrow.checkpoint.adapter import Format, Source
from megagrow.checkpoint.deepspeed import client_state
from megagrow.checkpoint.directory import READING, RESTORE, laid_out, naming
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.megatron_sink import FILE, LATEST, MegatronSink
from megagrow.checkpoint.pickles import Opaque, StoredTensor
from megagrow.checkpoint.stored import Record, StoredBox, StoredSource
from megagrow.checkpoint.torchfile import TorchFile, read_torch_file
from megagrow.errors import CheckpointError
from megagrow.layout import Layout
from megagrow.model.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS, MASTER, Catalog, LogicalTensor

_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?")
_ITERATION = re.compile(r"iter_(\d{7,9})")
_HALF = 2  # bytes of an element that has a master elsewhere
# Where the axes of QKV [group, projection, head width, embed] lie before version 2.0.
_OLD_QKV = {0.0: (1, 0, 2), 1.0: (0, 2, 1)}


@dataclass(frozen=True)
class _Rank:
    """One file of the grid.

    Attributes:
        parameters: by stored name, in the module's order; a tied copy among them.
        first_layer: of its pipeline stage.
    """

    tensor: int
    pipe: int
    file: TorchFile
    parameters: Mapping[str, StoredTensor]
    first_layer: int

    @property
    def value(self) -> dict[str, Any]:
        value: dict[str, Any] = self.file.value
        return value

    @property
    def where(self) -> str:
        return str(self.file.path)


def open_source(path: Path) -> Source:
    """Open an iteration's directory, or the one above it.

    Raises:
        CheckpointError: missing, damaged, incomplete, hostile, or of a model that is not ours.
    """
    with laid_out(path, "Megatron-LM lays out its checkpoints"):
        return _open(find(path) or path)


def _open(path: Path) -> Source:
    ranks = _read_ranks(path)
    first = ranks[0]
    args = _arguments(first)
    version = float(first.value.get("checkpoint_version", 0.0))
    if version not in (0.0, 1.0, 2.0, 3.0):
        raise CheckpointError(
            f"{first.where}: checkpoint_version", found=version, expected="0 to 3"
        )
    told = client_state(first.value)
    model, padded = names.read_model(args, where=first.where)
    layout = Layout(
        tensor=1 + max(rank.tensor for rank in ranks), pipeline=1 + max(rank.pipe for rank in ranks)
    )
    for rank in ranks:
        _check_rank(rank, first, layout, version)
    catalog = build_catalog(model)
    moments = all(_moments(rank, args) for rank in ranks)
    slots = ADAM_SLOTS if moments else (MASTER,)
    boxes: list[StoredBox] = []
    for rank in ranks:
        boxes += _boxes(rank, path, catalog, layout, padded, version, moments)
    config = {**told["config"]}
    config.setdefault("model", model.model_dump(mode="json", by_alias=True))
    iteration = first.value.get("iteration")
    step = told["step"] if told["step"] is not None else _count(iteration)
    consumed = args.get("consumed_train_samples")
    state = told["run_state"] or {
        "optimizer_step": step,
        **({"consumed_samples": consumed} if isinstance(consumed, int) else {}),
    }
    files = {rank.file.path.relative_to(path).as_posix(): rank.file for rank in ranks}
    return StoredSource(
        path,
        meta=CheckpointMeta(catalog, slots, layout, config, told["fingerprints"], state),
        step=step,
        sizes={name: file.size for name, file in sorted(files.items())},
        boxes=boxes,
        records=[Record(name, *record) for name, file in files.items() for record in file.records],
    )


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


# --- the grid -----------------------------------------------------------------------------


def _read_ranks(path: Path) -> list[_Rank]:
    """All files of the grid, tensor-parallel ranks within pipeline stages."""
    with naming(path, "cannot be read", READING):
        listed = sorted(entry.name for entry in path.iterdir() if entry.name.startswith("mp_rank_"))
    grid: dict[tuple[int, int], str] = {}
    for name in listed:
        match = _RANK.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{path / name}: a rank of a grid that is not tensor x pipeline",
                expected="mp_rank_TT or mp_rank_TT_PPP",
                mend="checkpoints of experts are not read",
            )
        grid[int(match[2] or 0), int(match[1])] = name
    if not grid:
        raise CheckpointError(f"{path}: has no mp_rank_* directory", mend=RESTORE)
    pipes, tensors = (1 + max(key[i] for key in grid) for i in (0, 1))
    missing = [(p, t) for p in range(pipes) for t in range(tensors) if (p, t) not in grid]
    if missing or len({"_" in n.removeprefix("mp_rank_") for n in grid.values()}) > 1:
        at = f"tensor rank {missing[0][1]}, stage {missing[0][0]}" if missing else "two kinds"
        raise CheckpointError(
            f"{path}: its mp_rank directories do not make up one checkpoint",
            found=f"{at}: missing" if missing else "names with and without a stage",
            mend=RESTORE,
        )
    ranks: list[_Rank] = []
    first_layer = 0
    for pipe in range(pipes):
        layers = 0
        for tensor in range(tensors):
            file = read_torch_file(path / grid[pipe, tensor] / FILE)
            parameters = _parameters(file)
            ranks.append(_Rank(tensor, pipe, file, parameters, first_layer))
            numbers = {names.local_layer(name) for name in parameters} - {None}
            layers = max(layers, len(numbers))
        first_layer += layers
    return ranks


def _parameters(file: TorchFile) -> dict[str, StoredTensor]:
    value = file.value
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict):
        parts = isinstance(value, dict) and "model0" in value
        raise CheckpointError(
            f"{file.path}: has no `model`",
            found="an interleaved pipeline, `model0`" if parts else None,
            mend="save it without --num-layers-per-virtual-pipeline-stage" if parts else RESTORE,
        )
    return {
        name: tensor
        for name, tensor in _flat(model)
        if isinstance(tensor, StoredTensor) and names.is_parameter(name)
    }


def _flat(value: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as dotted names."""
    for key, item in value.items():
        if isinstance(item, dict) and depth < 8:
            yield from _flat(item, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", item


def _arguments(rank: _Rank) -> Mapping[str, Any]:
    args = rank.value.get("args")
    if not isinstance(args, Opaque) or not isinstance(args.state, dict):
        raise CheckpointError(
            f"{rank.where}: has no `args`, so nothing tells what the model is", mend=RESTORE
        )
    return args.state


def _check_rank(rank: _Rank, first: _Rank, layout: Layout, version: float) -> None:
    """See that a file is of the same save as the first."""
    args, wanted = _arguments(rank), _arguments(first)
    told = {
        "iteration": (rank.value.get("iteration"), first.value.get("iteration")),
        "checkpoint_version": (float(rank.value.get("checkpoint_version", 0.0)), version),
        "tensor_model_parallel_size": (
            args.get("tensor_model_parallel_size", layout.tensor),
            layout.tensor,
        ),
        "pipeline_model_parallel_size": (
            args.get("pipeline_model_parallel_size", layout.pipeline),
            layout.pipeline,
        ),
        **{key: (args.get(key), wanted.get(key)) for key in ("hidden_size", "padded_vocab_size")},
        "megagrow": (client_state(rank.value), client_state(first.value)),
    }
    for what, (found, expected) in told.items():
        if found != expected:
            raise CheckpointError(
                f"{rank.where}: is of another save: {what}",
                found=f"{found!r:.60}",
                expected=f"{expected!r:.60}",
                mend=RESTORE,
            )


# --- values -------------------------------------------------------------------------------


def _boxes(
    rank: _Rank,
    path: Path,
    catalog: Catalog,
    layout: Layout,
    padded: int,
    version: float,
    moments: bool,
) -> Iterator[StoredBox]:
    file = rank.file.path.relative_to(path).as_posix()
    states = _states(rank) if moments else {}
    for stored, value in rank.parameters.items():
        if _is_copy(stored, catalog):
            continue
        name = names.logical_name(stored, rank.first_layer)
        if name is None or name not in catalog:
            raise CheckpointError(f"{rank.where}: {stored[:200]}: not in the model of its args")
        tensor = catalog[name]
        box, shape = names.local_part(tensor, layout, rank.tensor, padded)
        held = {MASTER.name: value} | states.get(stored, {})
        for slot, found in held.items():
            if found.shape != shape:
                raise CheckpointError(
                    f"{rank.where}: {stored}, slot {slot}: shape",
                    found=list(found.shape),
                    expected=list(shape),
                    mend=RESTORE,
                )
            if box is None or (rank.tensor and box.shape == tensor.shape):
                continue  # padding, or a replica
            axes = _qkv_axes(tensor, version)
            yield StoredBox(name, slot, box, file, found.start, found.dtype, axes)


def _is_copy(stored: str, catalog: Catalog) -> bool:
    """Whether it is the last stage's copy of a tied token table."""
    return "output.weight" not in catalog and stored.removeprefix("language_model.") in (
        names.TIED_COPIES
    )


def _qkv_axes(tensor: LogicalTensor, version: float) -> tuple[int, ...] | None:
    if "projection" not in tensor.axes or version not in _OLD_QKV:
        return None
    if tensor.shape[1] != 3:
        raise ValueError(f"checkpoint_version {version} knows no grouped queries")
    return _OLD_QKV[version] + tuple(range(3, len(tensor.shape)))


def _optimizer(rank: _Rank) -> tuple[dict[str, Any], list[Any]]:
    """The state of the torch optimizer, and the masters of its groups, where they are apart."""
    saved = rank.value.get("optimizer")
    if not isinstance(saved, dict):
        return {}, []
    masters = saved.get("fp32_from_fp16_params") or saved.get("fp32_from_fp16") or ()
    inner = saved.get("optimizer", saved.get("optimizer_state_dict", saved))
    return (inner if isinstance(inner, dict) else {}), list(masters)


def _moments(rank: _Rank, args: Mapping[str, Any]) -> bool:
    """Whether the file has Adam's moments of whole parameters."""
    if args.get("use_distributed_optimizer"):
        return False
    states = _optimizer(rank)[0].get("state")
    return bool(states) and isinstance(states, dict)


def _states(rank: _Rank) -> dict[str, dict[str, StoredTensor]]:
    """By stored name the optimizer's tensors: moments, and a master where there is one apart.

    Parameters are numbered group by group, each in the module's order; biases and vectors are in
    the group without weight decay.
    """
    optimizer, masters = _optimizer(rank)
    states, groups = optimizer["state"], optimizer["param_groups"]
    plain = {n for n, t in rank.parameters.items() if n.endswith("bias") or len(t.shape) == 1}
    found: dict[str, dict[str, StoredTensor]] = {}
    for number, group in enumerate(groups):
        members = list(rank.parameters)
        if len([g for g in groups if g["params"]]) > 1:
            decays = group.get("wd_mult", group.get("weight_decay")) != 0.0
            members = [name for name in members if (name not in plain) == decays]
        if len(members) != len(group["params"]):
            raise CheckpointError(
                f"{rank.where}: optimizer: group {number} is not of these parameters",
                found=f"{len(group['params'])} parameters",
                expected=f"{len(members)}",
            )
        half = [n for n in members if rank.parameters[n].dtype.itemsize == _HALF]
        apart = dict(zip(half, masters[number], strict=True)) if masters else {}
        for name, index in zip(members, group["params"], strict=True):
            state = states[index]
            found[name] = {slot.name: state[slot.name] for slot in ADAM_SLOTS[1:]}
            if name in apart:
                found[name][MASTER.name] = apart[name]
            if not all(isinstance(tensor, StoredTensor) for tensor in found[name].values()):
                raise CheckpointError(f"{rank.where}: optimizer: state of {name} is no tensor")
    return found


# --- finding ------------------------------------------------------------------------------


def find(path: Path) -> Path | None:
    """The iteration's directory that a path means: itself, or the one that the tracker names."""
    if _is_iteration(path):
        return path
    tracker = path / LATEST
    if tracker.is_file() and tracker.stat().st_size < 100:
        text = tracker.read_text(errors="replace").strip()
        name = f"iter_{int(text):07d}" if text.isascii() and text.isdigit() else text
        if (name == "release" or _ITERATION.fullmatch(name)) and _is_iteration(path / name):
            return path / name
    return None


def _is_iteration(path: Path) -> bool:
    if not path.is_dir():
        return False
    ranks = (entry for entry in path.iterdir() if _RANK.match(entry.name) and entry.is_dir())
    return any((rank / FILE).exists() for rank in ranks)


FORMAT = Format(
    name="megatron",
    about="Megatron-LM's classic mp_rank_* grid (--ckpt-format torch)",
    find=find,
    open_source=open_source,
    open_sink=MegatronSink,
    axes=("tensor", "pipeline"),
)
