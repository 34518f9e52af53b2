"""How a family is stored in Hugging Face format: tensor names, settings, reading and writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError

NEVER = re.compile(r"(?!)")

# Settings that change what any model computes, with the values that megagrow supports; the first is
# the default.
COMMON: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}


@dataclass(frozen=True)
class Row:
    """One line of a table: a stored array and the part of a logical tensor that it is.

    Attributes:
        stored, tensor: names; `{i}` is the layer.
        axes: order of the logical axes in the array, or None for the logical order.
        rows: number of axes that form the array's first axis, the others form its second; 0 for a
            vector.
        cut: the part of a fused tensor: q, k or v; gate or up.

    Rows with the same stored name are parts of one array, one after another along its first axis.
    """

    stored: str
    tensor: str
    axes: tuple[int, ...] | None = None
    rows: int = 1
    cut: str = ""


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """How Hugging Face's transformers stores a family's models.

    Attributes:
        model_type, architecture: as config.json calls the family and its class.
        title: the family's usual name, for messages.
        ends, block: the tables of names, outside the blocks and for one block.
        read: (config.json, its path for messages) -> the section `model`.
        write: settings of a model's config.json, other than those common to all families.
        carried: keys of config.json that `read` reads.
        only: keys that change what the model computes, with the values that megagrow supports; the
            first is the default.
        repeats: keys that duplicate a field of `ModelConfig`, with that field.
        refusal: why a model cannot be written, and what was found, if it cannot.
        not_stored: training settings that config.json cannot express: (what, reason).
        prefix: of stored names; some directories omit it.
        masks: names of constant masks that old versions also stored.
        frequencies: names of rotary frequencies that old versions also stored.
    """

    model_type: str
    architecture: str
    title: str
    ends: tuple[Row, ...]
    block: tuple[Row, ...]
    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    carried: frozenset[str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: COMMON)
    repeats: Mapping[str, str] = field(default_factory=dict)
    refusal: Callable[[ModelConfig], tuple[str, str] | None] = lambda model: None
    not_stored: Callable[[ModelConfig], Iterable[tuple[str, str]]] = lambda model: ()
    prefix: str = ""
    masks: re.Pattern[str] = NEVER
    frequencies: re.Pattern[str] = NEVER


def keys(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def no_such_feature(where: str, key: str, found: Any, expected: Any) -> CheckpointError:
    """The error for a setting of config.json that megagrow's model does not support."""
    return CheckpointError(
        f"{where}: {key}: megagrow's model has no such feature",
        found=repr(found)[:200],
        expected=repr(expected),
    )


def head_dim_follows(title: str) -> Callable[[ModelConfig], tuple[str, str] | None]:
    """The refusal of a family whose configuration has no head_dim: it is hidden / heads."""

    def refusal(model: ModelConfig) -> tuple[str, str] | None:
        if model.heads * model.head_dim == model.hidden:
            return None
        return f"transformers' {title} derives head_dim from hidden / heads", f"{model.head_dim}"

    return refusal
