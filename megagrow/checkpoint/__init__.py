"""Checkpoints on disk.

The native format is a directory `step_<step>` with one safetensors file of
boxes a rank and one `manifest.json`; see `shards`, `manifest` and `directory`.
"""

from megagrow.checkpoint.directory import list_steps, newest, step_path
from megagrow.checkpoint.group import Group, SoloGroup
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.native import NativeCheckpoint
from megagrow.checkpoint.retention import retire, set_aside
from megagrow.checkpoint.save import save
from megagrow.checkpoint.shards import Piece

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
