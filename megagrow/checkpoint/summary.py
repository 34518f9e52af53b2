"""What a checkpoint is, in lines for a person to read."""

from __future__ import annotations

from pathlib import Path

from megagrow.checkpoint.directory import list_steps, step_path
from megagrow.checkpoint.manifest import NAME
from megagrow.checkpoint.native import NativeCheckpoint
from megagrow.errors import CheckpointError


def find(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run or a root of steps.

    Raises:
        CheckpointError: there is none.
    """
    if (path / NAME).is_file():
        return path
    for root in (path / "checkpoints", path):
        steps = list_steps(root) if root.is_dir() else []
        if steps:
            return step_path(root, steps[-1])
    raise CheckpointError(
        f"{path}: no checkpoint",
        expected="a checkpoint, or a run directory with a committed checkpoint in checkpoints/",
    )


def describe(checkpoint: NativeCheckpoint, *, checksums: str) -> str:
    """A summary; `checksums` tells their state."""
    model = checkpoint.config.get("model")
    shape = (
        ", ".join(f"{k} {v}" for k, v in model.items()) if isinstance(model, dict) else "unknown"
    )
    steps = list_steps(checkpoint.path.parent)
    count, slots = checkpoint.catalog.parameters, ", ".join(s.name for s in checkpoint.slots)
    rows = {
        "checkpoint": checkpoint.path,
        "format": f"native, by megagrow {checkpoint.version}",
        "step": checkpoint.step,
        "model": shape,
        "layout": checkpoint.layout,
        "tensors": f"{len(checkpoint.catalog):,} with {count:,} parameters",
        "slots": slots,
        "bytes": f"{checkpoint.bytes:,} in {len(checkpoint.files):,} files",
        "checksums": f"{checkpoint.checksums:,} chunks, {checksums}",
        "fingerprints": ", ".join(f"{k} {v}" for k, v in checkpoint.fingerprints.items()) or "none",
        "steps beside it": ", ".join(map(str, steps)) or "none",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
