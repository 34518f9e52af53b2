"""Which part of a model a logical tensor is: its role, with all norms and biases in one."""

from __future__ import annotations

from typing import Literal, get_args

from megagrow.state.catalog import LogicalTensor

Part = Literal["embedding", "position", "head", "reader", "writer", "vector"]
PARTS: tuple[Part, ...] = get_args(Part)

_PARTS: dict[str, Part] = {part: part for part in PARTS}


def part_of(tensor: LogicalTensor) -> Part:
    """The part of a tensor of one of our models.

    Returns:
        embedding: the table of tokens, which is the head too where that is tied;
        position: the table of learned positions;
        head: the output head's matrix of its own;
        reader: a matrix of a block whose inputs are the residual stream;
        writer: one whose outputs go to it;
        vector: a norm or a bias.
    """
    return _PARTS.get(tensor.role, "vector")
