"""Fingerprints of a run's data and tokenizer in its checkpoints, and their checks."""

from __future__ import annotations

from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.data.dataset import PreparedData
from megagrow.data.sampler import VALIDATION
from megagrow.errors import CheckpointError


def fingerprints(data: PreparedData) -> dict[str, str]:
    """Fingerprints of the training data, which a resumed run must match, and of validation."""
    return {**_of(data), "validation": VALIDATION}


def _of(data: PreparedData) -> dict[str, str]:
    return {"data": data.fingerprint, "tokenizer": data.content.tokenizer_sha256}


def is_of_run(checkpoint: CheckpointSource) -> bool:
    """Whether a checkpoint belongs to a run, and not just to a model."""
    return "stages" in checkpoint.config


def require_run(checkpoint: CheckpointSource) -> None:
    """Require that a checkpoint is a run's.

    Raises:
        CheckpointError: it was converted from weights without a run's configuration.
    """
    if not is_of_run(checkpoint):
        path = checkpoint.path
        raise CheckpointError(
            f"{path}: belongs to no run: it was converted without --config, so it has no data, "
            "seed or stages",
            fix=f"start a run from these weights: init.from={path}, in place of model, without "
            "--resume",
        )


def require_same_data(checkpoint: CheckpointSource, data: PreparedData) -> None:
    """Require that a dataset is the one that a checkpoint was trained on.

    Raises:
        CheckpointError: it has other tokens, or another tokenizer.
    """
    for name, found in _of(data).items():
        wanted = checkpoint.fingerprints.get(name)
        if wanted != found:
            raise CheckpointError(
                f"{checkpoint.path}: was trained on another {name} than data.path = {data.path}",
                found=wanted,
                expected=found,
                fix="set data.path to the dataset of the run; or start a run on this data from its "
                f"weights: init.from={checkpoint.path} and run.dir=NEW, without --resume",
            )
