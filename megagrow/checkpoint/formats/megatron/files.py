"""The files of one Megatron-LM iteration: a grid of tensor-parallel ranks and pipeline stages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.containers.pickle_reader import Opaque
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_reader import TorchFile, read_torch_file
from megagrow.checkpoint.formats.megatron import names
from megagrow.checkpoint.formats.megatron.sink import FILE
from megagrow.checkpoint.interface.client_state import client_state
from megagrow.checkpoint.io.files import READING, RESTORE, naming
from megagrow.errors import CheckpointError
from megagrow.state.layout import Layout

RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?")


@dataclass(frozen=True)
class RankFile:
    """One file of the grid.

    Attributes:
        parameters: by stored name, in the module's order, including a tied copy.
        first_layer: the first layer of its pipeline stage.
    """

    tensor: int
    pipe: int
    file: TorchFile
    parameters: Mapping[str, StoredTensor]
    first_layer: int

    @property
    def value(self) -> dict[str, Any]:
        """The contents of the file."""
        value: dict[str, Any] = self.file.value
        return value

    @property
    def where(self) -> str:
        """Its path, for errors."""
        return str(self.file.path)


def read_ranks(path: Path) -> list[RankFile]:
    """All files of the grid, tensor-parallel ranks within pipeline stages."""
    with naming(path, "cannot be read", READING):
        listed = sorted(entry.name for entry in path.iterdir() if entry.name.startswith("mp_rank_"))
    grid: dict[tuple[int, int], str] = {}
    for name in listed:
        match = RANK.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{path / name}: a rank of a grid that is not tensor x pipeline",
                expected="mp_rank_TT or mp_rank_TT_PPP",
                fix="checkpoints of experts are not read",
            )
        grid[int(match[2] or 0), int(match[1])] = name
    if not grid:
        raise CheckpointError(f"{path}: has no mp_rank_* directory", fix=RESTORE)
    pipes, tensors = (1 + max(key[i] for key in grid) for i in (0, 1))
    missing = [(p, t) for p in range(pipes) for t in range(tensors) if (p, t) not in grid]
    if missing or len({"_" in n.removeprefix("mp_rank_") for n in grid.values()}) > 1:
        at = f"tensor rank {missing[0][1]}, stage {missing[0][0]}" if missing else "two kinds"
        raise CheckpointError(
            f"{path}: its mp_rank directories do not make up one checkpoint",
            found=f"{at}: missing" if missing else "names with and without a stage",
            fix=RESTORE,
        )
    ranks: list[RankFile] = []
    first_layer = 0
    for pipe in range(pipes):
        layers = 0
        for tensor in range(tensors):
            file = read_torch_file(path / grid[pipe, tensor] / FILE)
            parameters = _parameters(file)
            ranks.append(RankFile(tensor, pipe, file, parameters, first_layer))
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
            fix="save it without --num-layers-per-virtual-pipeline-stage" if parts else RESTORE,
        )
    return {
        name: tensor
        for name, tensor in flat(model)
        if isinstance(tensor, StoredTensor) and names.is_parameter(name)
    }


def flat(value: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Flatten nested dictionaries into dotted names."""
    for key, item in value.items():
        if isinstance(item, dict) and depth < 8:
            yield from flat(item, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", item


def arguments_of(rank: RankFile) -> Mapping[str, Any]:
    """Megatron's arguments in a file (CheckpointError if there are none)."""
    args = rank.value.get("args")
    if not isinstance(args, Opaque) or not isinstance(args.state, dict):
        raise CheckpointError(f"{rank.where}: has no `args`, so the model is unknown", fix=RESTORE)
    return args.state


def check_rank(rank: RankFile, first: RankFile, layout: Layout, version: float) -> None:
    """Check that a file is from the same save as the first."""
    args, wanted = arguments_of(rank), arguments_of(first)
    stated = {
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
    for what, (found, expected) in stated.items():
        if found != expected:
            raise CheckpointError(
                f"{rank.where}: is from another save: {what}",
                found=f"{found!r:.60}",
                expected=f"{expected!r:.60}",
                fix=RESTORE,
            )
