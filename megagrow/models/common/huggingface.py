"""What a family tells of its directories of Hugging Face: names, settings, ways to write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError

NEVER = re.compile(r"(?!)")

# Settings that change what any model computes, with the values that ours computes too; a setting
# that is absent has the first.
COMMON: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}


@dataclass(frozen=True)
class Row:
    """One line of a table: a stored array and what it is of a logical tensor.

    Attributes:
        stored, tensor: names; `{i}` is the layer.
        axes: order of the logical axes in the array, or None for their own.
        rows: how many of those make the array's first axis, the others its second; 0 for a vector.
        cut: the part of a fused tensor: q, k or v; gate or up.
    """

    stored: str
    tensor: str
    axes: tuple[int, ...] | None = None
    rows: int = 1
    cut: str = ""


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """How models of a family are stored by Hugging Face's transformers.

    Attributes:
        model_type, architecture: as config.json calls the family and its class.
        title: what people call the family, in messages.
        ends, block: the tables of names, outside of the blocks and of one of them.
        read: (config.json, its path for messages) -> our section `model`.
        write: settings of config.json of a model, besides those that all families have.
        carried: keys of config.json that `read` reads.
        only: keys that change what the model computes, with the values that ours computes too; a
            setting that is absent has the first.
        repeats: keys that say once more what a field of our model says, by that field.
        refusal: why a model cannot be written, with what is found, if it cannot.
        untold: settings of the training that config.json has no place for: (what, reason).
        prefix: of stored names, which some directories leave out.
        masks: names of constant masks that old versions stored along.
        frequencies: names of rotary frequencies that old versions stored along.
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
    untold: Callable[[ModelConfig], Iterable[tuple[str, str]]] = lambda model: ()
    prefix: str = ""
    masks: re.Pattern[str] = NEVER
    frequencies: re.Pattern[str] = NEVER


def keys(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def no_such_feature(where: str, key: str, found: Any, expected: Any) -> CheckpointError:
    """What a setting of config.json that our model cannot express is refused with."""
    return CheckpointError(
        f"{where}: {key}: megagrow's model has no such feature",
        found=repr(found)[:200],
        expected=repr(expected),
    )
