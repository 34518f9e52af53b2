"""Classify the names in another program's state dict: parameters, moments, step counts, the rest.

    NAME                                    a parameter
    optimizer.state.NAME.exp_avg            its moment, as in torch's flattened optimizer state
    optim.state.NAME.exp_avg_sq             the same in a dictionary {"model": ..., "optim": ...},
                                            where the parameter is model.NAME
    optimizer.state.NAME.step               its number of updates

The meaning of axes is unknown, so such tensors cannot be split for tensor parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megagrow.checkpoint.containers.dcp_metadata import METADATA, Entry
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_reader import read_torch_file
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.errors import CheckpointError
from megagrow.state.catalog import ADAM_SLOTS, MASTER, Catalog, Init, LogicalTensor
from megagrow.state.layout import Layout

_STATE = re.compile(
    r"(?:(?P<root>.*\.)??(?:optimizer|optim)\.)?state\.(?P<name>.+)\.(?P<slot>[^.]+)", re.DOTALL
)
_NO_PARAMETER = re.compile(
    r"(optimizer|optim|state|param_groups|lr_scheduler|train_state)\..*"
    r"|.*\.(optimizer|optim)\.(state|param_groups)\..*",
    re.DOTALL,
)
_MOMENTS = [slot.name for slot in ADAM_SLOTS[1:]]


@dataclass(frozen=True)
class Foreign:
    """The contents of a state dict.

    Attributes:
        names: (tensor, slot) to its name in the state dict.
        zeros: element type of each (tensor, slot) that the state dict lacks.
        read: names of what is carried in the run state.
        left_out: the rest.
    """

    meta: CheckpointMeta
    names: Mapping[tuple[str, str], str]
    zeros: Mapping[tuple[str, str], torch.dtype] = field(default_factory=dict)
    read: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def read_foreign(path: Path, entries: Mapping[str, Entry], others: tuple[str, ...]) -> Foreign:
    """Classify the names in a directory that megagrow did not write.

    Args:
        entries: its plain tensors.
        others: names of everything that is not a plain tensor.

    Raises:
        CheckpointError: no tensor is a parameter, or a count of updates cannot be read.
    """
    parameters = {n: e for n, e in entries.items() if not _NO_PARAMETER.fullmatch(n)}
    if not parameters:
        raise CheckpointError(f"{path / METADATA}: has no tensor that is a parameter")
    names = {(name, MASTER.name): name for name in parameters}
    left_out: dict[str, str] = dict.fromkeys(others, "no tensor")
    moments: dict[str, dict[str, str]] = {}
    steps: dict[str, str] = {}
    for stored, entry in entries.items():
        if stored in parameters:
            continue
        match = _STATE.fullmatch(stored)
        owner = _owner(match, parameters) if match else None
        if match is None or owner is None:
            left_out[stored] = "no parameter, and state of none"
        elif match["slot"] in _MOMENTS and entry.shape == parameters[owner].shape:
            moments.setdefault(owner, {})[match["slot"]] = stored
        elif match["slot"] in _MOMENTS:
            left_out[stored] = "not of its parameter's shape"
        elif match["slot"] == "step":
            steps[stored] = owner
        else:
            left_out[stored] = "a slot that Adam does not have"
    kept = [slot for slot in _MOMENTS if any(slot in held for held in moments.values())]
    zeros: dict[tuple[str, str], torch.dtype] = {}
    for name, entry in parameters.items():
        held = moments.get(name, {})
        if len(held) < len(kept):
            # With a zero second moment, the first moment would make an unbounded update.
            reason = f"{' and '.join(s for s in kept if s not in held)} of {name[:200]} are missing"
            left_out |= dict.fromkeys(held.values(), reason)
            zeros |= {(name, slot): entry.dtype for slot in kept}
        else:
            names |= {(name, slot): stored for slot, stored in held.items()}
    state: dict[str, int] = {}
    read: tuple[str, ...] = ()
    if kept:
        counts = {stored: _count(path, stored, entries[stored]) for stored in steps}
        latest = max(counts.values(), default=0)
        read = tuple(stored for stored, count in counts.items() if count == latest)
        state = {"optimizer_step": latest} if counts else {}
        for stored, count in counts.items():
            if count != latest:
                left_out[stored] = f"counts {count} updates; {latest}, the greatest, is carried"
    else:
        left_out |= dict.fromkeys(steps, "counts updates of moments that are not there")
    meta = CheckpointMeta(
        catalog=Catalog(tuple(_tensors(parameters))),
        slots=(MASTER, *(slot for slot in ADAM_SLOTS[1:] if slot.name in kept)),
        layout=Layout(),
        config={},
        fingerprints={},
        run_state=state,
    )
    items = tuple(LeftOut(name, reason) for name, reason in left_out.items())
    return Foreign(meta, names, zeros, read, items)


def _tensors(parameters: Mapping[str, Entry]) -> Iterator[LogicalTensor]:
    for name, entry in parameters.items():
        yield LogicalTensor(
            name,
            entry.shape,
            tuple(f"axis{i}" for i in range(len(entry.shape))),
            Init("normal", 0.02),
            decay=len(entry.shape) > 1,
            places=(0,),
        )


def _owner(match: re.Match[str], parameters: Mapping[str, Entry]) -> str | None:
    """The parameter that a state belongs to: by its name, or as part of a sibling `model`."""
    root = match["root"] or ""
    for name in (match["name"], f"{root}{match['name']}", f"{root}model.{match['name']}"):
        if name in parameters:
            return name
    return None


def _count(path: Path, name: str, entry: Entry) -> int:
    """The value of a one-element tensor."""
    if len(entry.chunks) == 1:
        [chunk] = entry.chunks
        file = path / chunk.file
        value = read_torch_file(file, start=chunk.start, length=chunk.length).value
        if isinstance(value, StoredTensor) and value.numel == 1:
            number = value.item()
            if number >= 0 and number.is_integer():
                return int(number)
    raise CheckpointError(f"{path / METADATA}: {name[:200]}: no count of updates")
