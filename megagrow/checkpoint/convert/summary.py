"""Describe a checkpoint in lines of text."""

from __future__ import annotations

from collections.abc import Mapping

from megagrow.checkpoint.interface.accounting import enumerated, made_zeros, summary
from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.checkpoint.interface.history import KEY
from megagrow.checkpoint.interface.model_of import recorded_model
from megagrow.checkpoint.native.source import NativeCheckpoint
from megagrow.checkpoint.native.steps import list_steps
from megagrow.errors import CheckpointError
from megagrow.state.catalog import slots_of

_NO_CHECKSUMS = "none: the format has none, so flipped bits in values are not found"


def describe(source: CheckpointSource, *, format_name: str, checksums: str) -> str:
    """A summary.

    Args:
        format_name: the format's name on the command line.
        checksums: the state of the format's checksums.
    """
    by = f", by megagrow {source.version}" if isinstance(source, NativeCheckpoint) else ""
    steps = list_steps(source.path.parent)
    count, slots = source.catalog.parameters, ", ".join(s.name for s in source.slots)
    dtypes = sorted({str(source.dtype(t.name, source.slots[0].name)) for t in source.catalog})
    rows = {
        "checkpoint": source.path,
        "format": f"{format_name}{by}",
        "step": source.step,
        "model": _model(source),
        "layout": source.layout,
        "tensors": f"{len(source.catalog):,} with {count:,} parameters, {', '.join(dtypes)}",
        "slots": slots,
        "bytes": f"{source.bytes:,} in {len(source.files):,} files",
        "checksums": f"{source.checksums:,}, {checksums}" if source.checksums else _NO_CHECKSUMS,
        "fingerprints": ", ".join(f"{k} {v}" for k, v in source.fingerprints.items()) or "none",
        "other steps": ", ".join(map(str, steps)) or "none",
    }
    origin = source.run_state.get("origin")
    if isinstance(origin, Mapping):
        rows["started"] = ", ".join(f"{key} {value}" for key, value in origin.items() if key != KEY)
    if source.zeros:
        made = made_zeros(source, [slot.name for slot in source.slots])
        rows["zeros"] = f"{enumerated(made)} (the files hold none)"
    lines = summary(source.left_out)
    rows |= {f"left out{'' if i == 0 else f' {i + 1}'}": line for i, line in enumerate(lines)}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _model(source: CheckpointSource) -> str:
    try:
        model = recorded_model(source)
    except CheckpointError as error:
        return f"unknown: {str(error).splitlines()[0]}"
    if model is None:
        return "unknown: the checkpoint does not say"
    sizes = model.model_dump(mode="json", by_alias=True)
    grown = source.run_state.get("growth_stage", 0)
    stage = f", in growth stage {grown}" if grown else ""
    return ", ".join(f"{key} {value}" for key, value in sizes.items()) + stage


def list_tensors(source: CheckpointSource) -> str:
    """One line per tensor: name, shape, axes, and the element type of each slot."""
    rows = []
    for tensor in source.catalog:
        held = slots_of(tensor, source.slots)
        kinds = [f"{slot.name} {source.dtype(tensor.name, slot.name)}" for slot in held]
        shape = " x ".join(f"{axis} {n}" for axis, n in zip(tensor.axes, tensor.shape, strict=True))
        rows.append((tensor.name, shape or "one number", ", ".join(kinds).replace("torch.", "")))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
