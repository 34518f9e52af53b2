"""Checkpoints on disk.

The native format is a directory `step_<step>` with one safetensors file of boxes per rank and
one `manifest.json`; see `native.shard_file`, `native.manifest` and `native.steps`.
"""

from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.native.collective import Group, SoloGroup
from megagrow.checkpoint.native.retention import retire, set_aside
from megagrow.checkpoint.native.save import save
from megagrow.checkpoint.native.shard_file import Piece
from megagrow.checkpoint.native.source import NativeCheckpoint
from megagrow.checkpoint.native.steps import list_steps, newest, step_path

__all__ = [
    "CheckpointMeta",
    "Group",
    "NativeCheckpoint",
    "Piece",
    "SoloGroup",
    "list_steps",
    "newest",
    "retire",
    "save",
    "set_aside",
    "step_path",
]
