"""Which part of a model a logical tensor is, by its axes and its places."""

from __future__ import annotations

from typing import Literal, get_args

from megagrow.state.catalog import LogicalTensor

Part = Literal["embedding", "position", "head", "reader", "writer", "vector"]
PARTS: tuple[Part, ...] = get_args(Part)


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
    if len(tensor.axes) == 1 or "embed" not in tensor.axes:  # a fused bias has several axes
        return "vector"
    if "position" in tensor.axes:
        return "position"
    if "vocab" in tensor.axes:
        return "embedding" if 0 in tensor.places else "head"
    return "writer" if tensor.axes[0] == "embed" else "reader"


def is_gain(tensor: LogicalTensor) -> bool:
    """Whether a norm multiplies by it: a vector that does not begin as 0, as all biases do.

    It begins as 1, or under muP as what the shape asks for.
    """
    return part_of(tensor) == "vector" and tensor.init.kind != "zeros"
