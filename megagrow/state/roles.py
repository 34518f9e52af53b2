"""Roles: what a logical tensor does in its model. Code tests the role, never the name.

    embedding                            the token embedding, also the output head if tied
    position                             the learned position embedding
    head                                 the weight of an untied output head
    reader, reader_bias                  a block's matrix that reads the residual stream; its bias
    writer, writer_bias                  a block's matrix that writes to it; its bias
    norm_gain, norm_bias                 the norms of the residual stream inside a block
    post_norm_gain                       the norms of what a block writes to it
    query_gain, key_gain                 the norms of queries and keys
    final_norm_gain, final_norm_bias     the norm before the head
    other                                anything else, or unknown

A frozen tensor or buffer has a role as well; see `LogicalTensor.training`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

Role = Literal[
    "embedding",
    "position",
    "head",
    "reader",
    "reader_bias",
    "writer",
    "writer_bias",
    "norm_gain",
    "norm_bias",
    "post_norm_gain",
    "query_gain",
    "key_gain",
    "final_norm_gain",
    "final_norm_bias",
    "other",
]
ROLES: tuple[Role, ...] = get_args(Role)

MATRICES: frozenset[Role] = frozenset({"reader", "writer"})
WRITERS: frozenset[Role] = frozenset({"writer", "writer_bias"})
HEAD_GAINS: frozenset[Role] = frozenset({"query_gain", "key_gain"})
# Gains of norms over the residual stream's units.
GAINS: frozenset[Role] = frozenset({"norm_gain", "post_norm_gain", "final_norm_gain"})
FINAL_NORM: frozenset[Role] = frozenset({"final_norm_gain", "final_norm_bias"})
NORMS: frozenset[Role] = GAINS | HEAD_GAINS | FINAL_NORM | {"norm_bias"}


# --- files written before tensors had roles -------------------------------------------------

# Such files exist for two model families, which used these names.
_EARLIER: tuple[tuple[str, Role], ...] = (
    (r"embedding\.token", "embedding"),
    (r"embedding\.position", "position"),
    (r"output\.weight", "head"),
    (r"final_norm\.weight", "final_norm_gain"),
    (r"final_norm\.bias", "final_norm_bias"),
    (r"layers\.\d+\.(attention|mlp)\.norm\.weight", "norm_gain"),
    (r"layers\.\d+\.(attention|mlp)\.norm\.bias", "norm_bias"),
    (r"layers\.\d+\.(attention\.qkv|mlp\.up)\.weight", "reader"),
    (r"layers\.\d+\.(attention\.qkv|mlp\.up)\.bias", "reader_bias"),
    (r"layers\.\d+\.(attention\.out|mlp\.down)\.weight", "writer"),
    (r"layers\.\d+\.(attention\.out|mlp\.down)\.bias", "writer_bias"),
)


def with_roles(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tensors of a stored catalog, with roles added if an earlier version wrote it.

    In that version `role` meant what `training` means now.
    """
    found = [dict(item) for item in items]
    if any(item.get("role") in ROLES for item in found):
        return found
    biased = any(item["name"] == "final_norm.bias" for item in found)
    for item in found:
        item["training"] = item.pop("role", None) or "trained"
        role = _earlier_role(item["name"], item["axes"])
        item["role"], item["reads"] = role, _earlier_reads(role, item["axes"])
        item["centred"] = biased and role in NORMS
    return found


def _earlier_role(name: str, axes: Iterable[str]) -> Role:
    if set(axes).isdisjoint(("embed", "ffn", "head_dim")):  # a foreign model
        return "other"
    return next((role for pattern, role in _EARLIER if re.fullmatch(pattern, name)), "other")


def _earlier_reads(role: Role, axes: Iterable[str]) -> tuple[str, ...]:
    """A writer's inputs are all axes but the residual stream, a reader's input is the stream."""
    if role == "writer":
        return tuple(axis for axis in axes if axis != "embed")
    return ("embed",) if role in ("reader", "head") else ()
