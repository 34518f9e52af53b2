"""Detect Megatron's `torch_dist` directories, which resemble PyTorch's distributed checkpoints."""

from __future__ import annotations

from pathlib import Path

METADATA = "metadata.json"


def is_torch_dist(path: Path) -> bool:
    """Whether a directory has one of the formats that Megatron calls distributed."""
    return (path / METADATA).is_file() and any(
        (path / name).exists() for name in ("common.pt", ".metadata")
    )
