"""Load a checkpoint of any format as a plain model on one device, for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.interface.accounting import summary
from megagrow.checkpoint.interface.model_of import documents_apart, model_of
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.growth.operators.ramp import Ramp
from megagrow.models.common.documents import Separator
from megagrow.models.common.masks import ramp_in
from megagrow.models.common.parallel import SERIAL, TensorParallel
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement


def load_model(
    path: Path,
    *,
    name: str | None = None,
    device: torch.device | None = None,
    say: Callable[[str], object] = lambda line: None,
    parallel: TensorParallel = SERIAL,
) -> tuple[Transformer, ModelConfig, Path]:
    """Read the parameters of a checkpoint into an fp32 model, tensor by tensor.

    New units under a ramp have the weight that they had at that step of the run.

    Args:
        path: a checkpoint, or a run directory, which stands for its newest checkpoint.
        name: the format; detected by default.
        device: the model's device; the CPU by default.
        say: called with lines that list what the checkpoint holds and the model does not.
        parallel: this rank among tensor-parallel ones; each reads its own part.

    Returns:
        The model, its configuration, and the path of the checkpoint that was read.

    Raises:
        CheckpointError: not a checkpoint, damaged, or its model cannot be determined; with several
            ranks, also if new units are under a ramp.
        ConfigError: the model cannot be split over so many ranks.
    """
    kind, at = detect(path, name)
    source = kind.open_source(at)
    for line in summary(source.left_out):
        say(f"left out: {line}")
    shape = model_of(source)
    parameter = next((slot.name for slot in source.slots if slot.kind == "parameter"), None)
    if parameter is None:
        raise CheckpointError(f"{at}: holds no parameters")
    shape = shape.model_copy(update={"dropout": 0.0, "activation_checkpointing": "none"})
    model = Transformer(shape, parallel)
    placement = Placement(source.catalog, Layout(tensor=parallel.size))
    with torch.no_grad():
        for tensor, values in named_tensors(model).items():
            box = placement.local(source.catalog[tensor], parallel.rank).box
            read = source.read(tensor, parameter, box).to(torch.float32)
            # Behind it a vocabulary is padded, so that all ranks have as many rows.
            values.zero_()[tuple(map(slice, box.shape))].copy_(read)
    model.to(device or torch.device("cpu")).eval()
    if source.run_state.get("ramp"):
        if parallel.size > 1:
            raise CheckpointError(
                f"{at}: units of a growth are under a ramp, and the model is on several ranks",
                fix="use one process, or a checkpoint from after the ramp",
            )
        ramp = Ramp.from_json(source.run_state["ramp"])
        ramp_in(model, shape, ramp.old).set(ramp.progress(source.step))
    return model, shape, at


def read_as_in_training(
    model: Transformer, shape: ModelConfig, path: Path, *, eod: int, name: str | None = None
) -> bool:
    """Let a loaded model keep documents apart if its run did so; returns whether it did.

    Args:
        model, shape, path: as `load_model` gave them.
        eod: id of the token that ends a document.
        name: the format; detected by default.
    """
    kind, at = detect(path, name)
    if not documents_apart(kind.open_source(at)):
        return False
    first = next(model.parameters())
    model.separator = Separator.of(shape, eod, device=first.device, dtype=first.dtype)
    return True
