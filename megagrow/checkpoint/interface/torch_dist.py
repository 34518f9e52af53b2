"""Megatron's `torch_dist` directories, which PyTorch's distributed checkpoints look like."""

from __future__ import annotations

from pathlib import Path

METADATA = "metadata.json"


def is_torch_dist(path: Path) -> bool:
    """Whether a directory is in one of the formats that Megatron calls distributed."""
    return (path / METADATA).is_file() and any(
        (path / name).exists() for name in ("common.pt", ".metadata")
    )
