"""A coarser grouping of roles: all norms and biases are one part."""

from __future__ import annotations

from typing import Literal, get_args

from megagrow.state.catalog import LogicalTensor

Part = Literal["embedding", "position", "head", "reader", "writer", "vector"]
PARTS: tuple[Part, ...] = get_args(Part)

_PARTS: dict[str, Part] = {part: part for part in PARTS}


def part_of(tensor: LogicalTensor) -> Part:
    """The part that a tensor of a megagrow model belongs to.

    Returns:
        embedding: the token embedding, which is also the output head if tied;
        position: the learned position embedding;
        head: the weight of an untied output head;
        reader: a block's matrix that reads the residual stream;
        writer: a block's matrix that writes to the residual stream;
        vector: a norm or a bias.
    """
    return _PARTS.get(tensor.role, "vector")
