"""What a person tells of a DeepSpeed checkpoint whose model is not ours: a mapping file.

`megagrow.mapping.yaml`, in the directory of the tag or the one above, says for each parameter how
tensor-parallel ranks share it out, and, where the model is one that megagrow has, which of its
tensors it is.  docs/formats.md describes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagrow.checkpoint.directory import read_small
from megagrow.config import ModelConfig
from megagrow.config.load import in_words
from megagrow.config.yamltext import read_yaml
from megagrow.errors import CheckpointError, ConfigError
from megagrow.layout import Layout
from megagrow.state.boxes import Box
from megagrow.state.catalog import LogicalTensor
from megagrow.state.placement import Placement, split_axis

NAME = "megagrow.mapping.yaml"
_LIMIT = 1 << 20
_FIELD = re.compile(r"\{(\d+)([+-]\d+)?\}")


class Rule(BaseModel):
    """Parameters whose whole name a pattern matches."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: str
    name: str | None = None  # of our tensor; {1} is the first group of the pattern, {1-3} less 3
    split: Annotated[int, Field(ge=0, lt=16)] | None = None  # axis that the ranks share out
    parts: Annotated[int, Field(ge=1, lt=64)] = 1  # blocks on that axis, each shared out alone
    length: Annotated[int, Field(ge=1)] | None = None  # of that axis without padding


class MappingFile(BaseModel):
    """The content of a mapping file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig | None = None
    tensors: Annotated[list[Rule], Field(min_length=1)]


@dataclass(frozen=True)
class Local:
    """A tensor-parallel rank's part of a tensor.

    Attributes:
        shape: as the rank has it, padding included.
        blocks: (box of the rank's part, in whose place of the whole tensor it begins).
        split: whether ranks hold different parts.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[Box, tuple[int, ...]], ...]
    split: bool


def read_mapping(tag: Path) -> tuple[MappingFile, Path] | None:
    """The mapping file of a checkpoint, if it has one (CheckpointError where it is not valid)."""
    found = [path for path in (tag / NAME, tag.parent / NAME) if path.exists()]
    if not found:
        return None
    where = found[0]
    try:
        mapping = MappingFile.model_validate(
            read_yaml(read_small(where, _LIMIT), source=str(where))
        )
        for rule in mapping.tensors:
            re.compile(rule.match)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {in_words(error)[:500]}") from None
    except (ConfigError, re.error, ValueError) as error:
        raise CheckpointError(f"{where}: not valid", found=str(error)[:300]) from None
    return mapping, where


def rules_for(
    mapping: MappingFile, names: Sequence[str], *, where: Path, tensor: int
) -> dict[str, tuple[str, Rule]]:
    """By stored name: the tensor's name and the rule for it.

    Raises:
        CheckpointError: a name that no rule matches though it must be told, or that two match.
    """
    found: dict[str, tuple[str, Rule]] = {}
    for name in names:
        matches = [(rule, m) for rule in mapping.tensors if (m := re.fullmatch(rule.match, name))]
        if len(matches) > 1:
            raise CheckpointError(
                f"{where}: parameter {name}: two rules match",
                found=" and ".join(repr(rule.match) for rule, _ in matches[:2]),
                expected="one rule",
            )
        if not matches:
            if tensor > 1 or mapping.model is not None:
                raise CheckpointError(
                    f"{where}: parameter {name}: no rule matches",
                    mend="add a rule under `tensors`, for instance "
                    f"{{match: '{re.escape(name)}', split: 0}}; without `split` it is whole "
                    "on every rank",
                )
            found[name] = name, Rule(match=re.escape(name))
            continue
        rule, match = matches[0]
        found[name] = _expanded(rule.name or name, match, where), rule
    return found


def _expanded(template: str, match: re.Match[str], where: Path) -> str:
    def field(number: re.Match[str]) -> str:
        text = match[int(number[1])]
        return str(int(text) + int(number[2])) if number[2] else text

    try:
        return _FIELD.sub(field, template)
    except (IndexError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{where}: name {template!r} does not fit its pattern", found=str(error)
        ) from None


def whole_shape(rule: Rule, shape: Sequence[int], *, tensor: int, at: str) -> tuple[int, ...]:
    """The shape of the whole tensor of which each rank has a part of `shape` (CheckpointError)."""
    whole = list(shape)
    if rule.split is None or tensor == 1:
        return tuple(whole)
    axis = rule.split
    if axis >= len(whole) or (axis and (rule.parts > 1 or rule.length)):
        raise CheckpointError(
            f"{at}: split {axis}, parts {rule.parts}, length {rule.length}",
            found=f"shape {list(shape)}",
            expected="an axis of it, and the first one where there are parts or padding",
        )
    if whole[axis] % rule.parts:
        raise CheckpointError(f"{at}: {rule.parts} parts of {whole[axis]} rows are not equal")
    whole[axis] *= tensor
    if rule.length is not None:
        if not whole[axis] - whole[axis] // tensor < rule.length <= whole[axis] or rule.parts > 1:
            raise CheckpointError(
                f"{at}: length {rule.length} is not that of an axis shared out so",
                expected=f"at most {whole[axis]}, some of it on the last rank, and one part",
            )
        whole[axis] = rule.length
    return tuple(whole)


def local_of(
    tensor: LogicalTensor, rule: Rule, stored: Sequence[int], rank: int, layout: Layout
) -> Local:
    """Where a rank's part of a tensor lies, as a rule tells it."""
    if rule.split is None or layout.tensor == 1:
        box = Box((0,) * len(tensor.shape), tensor.shape)
        return Local(tensor.shape, ((box, box.offset),), split=False)
    axis, size = rule.split, stored[rule.split] // rule.parts
    blocks = []
    for part in range(rule.parts):
        start = part * size * layout.tensor + rank * size
        count = min(size, tensor.shape[axis] - start)
        offset, shape, place = [0] * len(stored), list(stored), [0] * len(stored)
        offset[axis], shape[axis], place[axis] = part * size, count, start
        blocks.append((Box(tuple(offset), tuple(shape)), tuple(place)))
    return Local(tuple(stored), tuple(blocks), split=True)


def local_of_ours(
    placement: Placement, tensor: LogicalTensor, stored: Sequence[int], rank: int
) -> Local | None:
    """Where a rank's part of a tensor of ours lies; None where the stored shape is not its own.

    The token table may have more padding than ours.
    """
    axis = split_axis(tensor)
    if axis is not None and tensor.axes[axis] == "vocab":
        rows = stored[0]
        start = min(rows * rank, tensor.shape[0])
        count = min(rows, tensor.shape[0] - start)
        if (
            tuple(stored[1:]) != tensor.shape[1:]
            or rows * placement.layout.tensor < tensor.shape[0]
        ):
            return None
        blocks = ((Box((0, 0), (count, stored[1])), (start, 0)),) if count else ()
        return Local(tuple(stored), blocks, split=placement.layout.tensor > 1)
    local = local_of_placement(placement, tensor, rank)
    return local if math.prod(stored) == math.prod(local.shape) else None


def local_of_placement(placement: Placement, tensor: LogicalTensor, rank: int) -> Local:
    """Where a rank's part of a tensor lies, as our own cut has it."""
    local = placement.local(tensor, rank)
    valid = local.box.relative_to(local.box.offset)
    return Local(local.shape, ((valid, local.box.offset),), split=placement.is_split(tensor))
