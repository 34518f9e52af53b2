"""The mapping file: user-supplied structure of a foreign DeepSpeed checkpoint.

`megagrow.mapping.yaml`, in the tag's directory or its parent, says how each parameter is split
over tensor-parallel ranks and, if megagrow has the model, which of its tensors it is.  See
docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megagrow.checkpoint.io.files import read_small
from megagrow.config import ModelConfig
from megagrow.config.load import in_words
from megagrow.config.yamltext import read_yaml
from megagrow.errors import CheckpointError, ConfigError
from megagrow.state.boxes import Box
from megagrow.state.catalog import LogicalTensor
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement, split_axis

NAME = "megagrow.mapping.yaml"
_LIMIT = 1 << 20
_FIELD = re.compile(r"\{(\d+)([+-]\d+)?\}")


class Rule(BaseModel):
    """Applies to parameters whose full name matches a pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: str
    name: str | None = None  # our tensor's; {1} is the pattern's first group, {1-3} that less 3
    split: Annotated[int, Field(ge=0, lt=16)] | None = None  # axis split over ranks
    parts: Annotated[int, Field(ge=1, lt=64)] = 1  # blocks on that axis, each split separately
    length: Annotated[int, Field(ge=1)] | None = None  # length of that axis without padding
    # For our models: the layout of a fused matrix, or which part of it the parameter is.
    order: Literal["qkv", "grouped", "gate_up", "up_gate"] | None = None
    part: Literal["q", "k", "v", "gate", "up"] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Rule:
        if self.order and self.part:
            raise ValueError("give order (of the whole) or part, not both")
        return self


class MappingFile(BaseModel):
    """The content of a mapping file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig | None = None
    tensors: Annotated[list[Rule], Field(min_length=1)]
    groups: list[list[str]] | None = None  # ZeRO 0's optimizer: name patterns per group

    @model_validator(mode="after")
    def _orders_are_of_ours(self) -> MappingFile:
        for rule in self.tensors:
            if self.model is None and (rule.order or rule.part):
                raise ValueError(f"rule {rule.match!r}: order and part go with `model`")
        return self


@dataclass(frozen=True)
class LocalPart:
    """A tensor-parallel rank's part of a tensor.

    Attributes:
        shape: the rank's shape, padding included.
        blocks: (box in the rank's part, the start of its place in the whole tensor).
        split: whether ranks hold different parts.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[Box, tuple[int, ...]], ...]
    split: bool


def read_mapping(tag: Path) -> tuple[MappingFile, Path] | None:
    """A checkpoint's mapping file, or None (CheckpointError if it is invalid)."""
    found = [path for path in (tag / NAME, tag.parent / NAME) if path.exists()]
    if not found:
        return None
    where = found[0]
    try:
        mapping = MappingFile.model_validate(
            read_yaml(read_small(where, _LIMIT), source=str(where))
        )
        patterns = [rule.match for rule in mapping.tensors]
        for pattern in (*patterns, *(one for group in mapping.groups or () for one in group)):
            re.compile(pattern)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {in_words(error)[:500]}") from None
    except (ConfigError, re.error, ValueError) as error:
        raise CheckpointError(f"{where}: not valid", found=str(error)[:300]) from None
    return mapping, where


def rules_for(
    mapping: MappingFile, names: Sequence[str], *, where: Path, tensor: int
) -> dict[str, tuple[str, Rule]]:
    """By stored name: the tensor's name and its rule.

    Raises:
        CheckpointError: a name that needs a rule matches none, or a name matches two.
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
                    fix="add a rule under `tensors`, for instance "
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
    """The full shape of a tensor whose part on each rank has `shape` (CheckpointError)."""
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
) -> LocalPart:
    """A rank's part of a tensor, as a rule describes it."""
    if rule.split is None or layout.tensor == 1:
        box = Box((0,) * len(tensor.shape), tensor.shape)
        return LocalPart(tensor.shape, ((box, box.offset),), split=False)
    axis, size = rule.split, stored[rule.split] // rule.parts
    blocks = []
    for part in range(rule.parts):
        start = part * size * layout.tensor + rank * size
        count = min(size, tensor.shape[axis] - start)
        offset, shape, place = [0] * len(stored), list(stored), [0] * len(stored)
        offset[axis], shape[axis], place[axis] = part * size, count, start
        blocks.append((Box(tuple(offset), tuple(shape)), tuple(place)))
    return LocalPart(tuple(stored), tuple(blocks), split=True)


def local_of_ours(
    placement: Placement, tensor: LogicalTensor, rule: Rule, stored: Sequence[int], rank: int
) -> LocalPart | None:
    """A rank's part of one of our tensors; None if the stored shape does not match.

    The token table may have more padding than ours.

    Raises:
        CheckpointError: a fused matrix whose order is not specified.
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
        return LocalPart(tuple(stored), blocks, split=placement.layout.tensor > 1)
    local = local_of_placement(placement, tensor, rank)
    for fused, arranged in (("projection", _queries), ("gate_up", _gates)):
        if fused in tensor.axes:
            if rule.order is None and rule.part is None and tuple(stored) != local.shape:
                raise CheckpointError(
                    f"its order is not specified: {tensor.name} is a fused matrix",
                    found=f"shape {list(stored)}",
                    fix=_HOW[fused],
                )
            local = arranged(local, rule)
        elif (rule.order or rule.part) in _WORDS[fused]:
            raise CheckpointError(f"{tensor.name} has no {rule.order or rule.part}")
    return local if _merges(local.shape, stored) else None


_WORDS = {"projection": ("qkv", "grouped", "q", "k", "v"),
          "gate_up": ("gate_up", "up_gate", "gate", "up")}  # fmt: skip
_HOW = {
    "projection": "add `order: qkv` (all queries, then all keys, then all values), "
    "`order: grouped` (the queries of a key/value head, its key, its value, head by head), or "
    "`part: q`, `part: k` and `part: v` to the rules for three parameters",
    "gate_up": "add `order: gate_up` or `order: up_gate`, or `part: gate` and `part: up` to the "
    "rules for two parameters",
}


def _queries(local: LocalPart, rule: Rule) -> LocalPart:
    """A rank's query, key and value [kv_group, query + 2, head_dim, ...] under a rule."""
    [(_, origin)] = local.blocks
    groups, each, *rest = local.shape
    queries, zero = each - 2, [0] * len(rest)
    if rule.order in (None, "grouped") and rule.part is None:
        return _checked(local, rule, "projection")
    first = origin[0]
    if rule.part in ("q", "k", "v"):
        start = {"q": 0, "k": queries, "v": queries + 1}[rule.part]
        shape = (groups, queries if rule.part == "q" else 1, *rest)
        whole = Box((0,) * len(shape), shape)
        return LocalPart(shape, ((whole, (first, start, *zero)),), local.split)
    _checked(local, rule, "projection")
    units = [(g, p) for g in range(groups) for p in range(queries)]
    units += [(g, queries + more) for more in (0, 1) for g in range(groups)]
    blocks = tuple(
        (Box((u, 0, *zero), (1, 1, *rest)), (first + g, p, *zero)) for u, (g, p) in enumerate(units)
    )
    return LocalPart((len(units), 1, *rest), blocks, local.split)


def _gates(local: LocalPart, rule: Rule) -> LocalPart:
    """A rank's gate and up projection [2, ffn, ...] under a rule."""
    [(_, origin)] = local.blocks
    _, *rest = local.shape
    zero = [0] * len(rest)
    one = Box((0, *zero), (1, *rest))
    if rule.part in ("gate", "up"):
        place = (int(rule.part == "up"), *origin[1:])
        return LocalPart((1, *rest), ((one, place),), local.split)
    if rule.order != "up_gate":
        return _checked(local, rule, "gate_up")
    blocks = tuple((one.moved_by((i, *zero)), (1 - i, *origin[1:])) for i in (0, 1))
    return LocalPart(local.shape, blocks, local.split)


def _checked(local: LocalPart, rule: Rule, fused: str) -> LocalPart:
    """The same, after checking that the rule applies to this kind of matrix (CheckpointError)."""
    stated = rule.order or rule.part
    if stated is not None and stated not in _WORDS[fused]:
        raise CheckpointError(
            f"a rule names {stated}, which the matrix does not have", fix=_HOW[fused]
        )
    return local


def _merges(ours: Sequence[int], stored: Sequence[int]) -> bool:
    """Whether a shape is ours with adjacent axes merged."""
    left = [n for n in ours if n != 1]
    for size in (n for n in stored if n != 1):
        joined = 1
        while left and joined < size:
            joined *= left.pop(0)
        if joined != size:
            return False
    return not left


def local_of_placement(placement: Placement, tensor: LogicalTensor, rank: int) -> LocalPart:
    """A rank's part of a tensor, under our own placement."""
    local = placement.local(tensor, rank)
    valid = local.box.relative_to(local.box.offset)
    return LocalPart(local.shape, ((valid, local.box.offset),), split=placement.is_split(tensor))
