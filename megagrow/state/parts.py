"""A coarser grouping of roles: all norms and biases are one part."""

from __future__ import annotations

from typing import Literal, get_args

from megagrow.state.catalog import LogicalTensor
from megagrow.state.roles import Role

Part = Literal["embedding", "position", "head", "reader", "writer", "vector", "other"]
PARTS: tuple[Part, ...] = get_args(Part)

# Every role has one (a test compares them).
_PARTS: dict[Role, Part] = {
    "embedding": "embedding",
    "position": "position",
    "head": "head",
    "reader": "reader",
    "reader_bias": "vector",
    "writer": "writer",
    "writer_bias": "vector",
    "norm_gain": "vector",
    "post_norm_gain": "vector",
    "query_gain": "vector",
    "key_gain": "vector",
    "norm_bias": "vector",
    "final_norm_gain": "vector",
    "final_norm_bias": "vector",
    "other": "other",
}


def part_of(tensor: LogicalTensor) -> Part:
    """The part that a tensor of a megagrow model belongs to.

    Returns:
        embedding: the token embedding, which is also the output head if tied;
        position: the learned position embedding;
        head: the weight of an untied output head;
        reader: a block's matrix that reads the residual stream;
        writer: a block's matrix that writes to the residual stream;
        vector: a norm or a bias;
        other: what has no role of these.
    """
    return _PARTS[tensor.role]
