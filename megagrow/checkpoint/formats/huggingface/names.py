"""Map each stored Hugging Face array to a box of one of our tensors and an order of axes.

Each family has its own table (`megagrow.models.<family>.huggingface`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.models.common.huggingface import HuggingFace, Row
from megagrow.state.boxes import Box, whole
from megagrow.state.catalog import Catalog, LogicalTensor


@dataclass(frozen=True)
class Link:
    """A part of a stored array: its box of a logical tensor and order of axes.

    Attributes:
        stored: name of the array.
        tensor, box: the elements.
        axes: the permutation of the box's axes under which they are stored.
        start: number of the array's elements before this part.
        shape: of the whole array.
    """

    stored: str
    tensor: str
    box: Box
    axes: tuple[int, ...] | None
    start: int
    shape: tuple[int, ...]


def links(stored: HuggingFace, model: ModelConfig, catalog: Catalog) -> Iterator[list[Link]]:
    """The parts of every array of a model, in the order of our catalog."""
    rows: dict[str, list[tuple[str, Row]]] = {}
    for row in stored.ends:
        rows.setdefault(row.tensor, []).append((row.stored, row))
    for i in range(model.layers):
        for row in stored.block:
            rows.setdefault(row.tensor.format(i=i), []).append((row.stored.format(i=i), row))
    for tensor in catalog:
        arrays: dict[str, list[tuple[Box, Row, tuple[int, ...]]]] = {}
        for name, row in rows[tensor.name]:
            box = _cut(tensor, row.cut)
            lengths = [box.shape[axis] for axis in row.axes or range(len(box.shape))]
            first, second = lengths[: row.rows], lengths[row.rows :]
            shape: tuple[int, ...] = (math.prod(second),)
            if row.rows:
                shape = (math.prod(first), *shape)
            arrays.setdefault(name, []).append((box, row, shape))
        for name, parts in arrays.items():
            whole_shape = (sum(shape[0] for *_, shape in parts), *parts[0][2][1:])
            found, start = [], 0
            for box, row, shape in parts:
                found.append(Link(name, tensor.name, box, row.axes, start, whole_shape))
                start += math.prod(shape)
            yield found


def _cut(tensor: LogicalTensor, name: str) -> Box:
    """The part of a fused tensor: query, key and value share one axis, as do gate and up."""
    box = whole(tensor.shape)
    if not name:
        return box
    axis = tensor.axes.index("gate_up" if name in ("gate", "up") else "projection")
    last = box.shape[axis] - 1
    start, stop = {
        "q": (0, last - 1), "k": (last - 1, last), "v": (last, last + 1),
        "gate": (0, 1), "up": (1, 2),
    }[name]  # fmt: skip
    offset, shape = list(box.offset), list(box.shape)
    offset[axis], shape[axis] = start, stop - start
    return Box(tuple(offset), tuple(shape))
