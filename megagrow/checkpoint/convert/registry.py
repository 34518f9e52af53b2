"""The registry of checkpoint formats, and their detection."""

from __future__ import annotations

from pathlib import Path

from megagrow.checkpoint.formats.dcp import source as dcp
from megagrow.checkpoint.formats.deepspeed import source as deepspeed
from megagrow.checkpoint.formats.deepspeed import universal_source as universal
from megagrow.checkpoint.formats.huggingface import adapter as huggingface
from megagrow.checkpoint.formats.megatron import source as megatron
from megagrow.checkpoint.interface.format import Format
from megagrow.checkpoint.native import sink as native
from megagrow.errors import CheckpointError

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (native, huggingface, deepspeed, universal, megatron, dcp)
}


def get_format(name: str) -> Format:
    """A format by its name (raises CheckpointError)."""
    try:
        return FORMATS[name]
    except KeyError:
        raise CheckpointError(
            f"{name}: no such checkpoint format", expected=", ".join(FORMATS)
        ) from None


def detect(path: Path, name: str | None = None) -> tuple[Format, Path]:
    """The format of a checkpoint, and the checkpoint that the path refers to.

    Args:
        name: the format to use; detected by default.

    Raises:
        CheckpointError: no format matches, or several do.
    """
    candidates = [get_format(name)] if name else list(FORMATS.values())
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no checkpoint",
            found="a file" if path.exists() else "nothing by that name",
            expected="a directory",
        )
    found = [(fmt, at) for fmt in candidates if (at := fmt.find(path)) is not None]
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            f"{path}: no checkpoint" + (f" of format {name}" if name else " of a known format"),
            found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty directory",
            expected=", ".join(f.name for f in candidates),
        )
    raise CheckpointError(
        f"{path}: holds checkpoints of several formats",
        found=", ".join(fmt.name for fmt, _ in found),
        fix="say which one to read with --from-format",
    )
