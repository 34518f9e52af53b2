"""Operator settings of a `grow` section other than sizes, and a description of the section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megagrow.config import GrowConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import Operator
from megagrow.growth.registry import OPERATORS, find_operators


def configured(parts: tuple[Operator, ...], grow: GrowConfig) -> tuple[Operator, ...]:
    """The operators with the settings of the section.

    Raises:
        GrowthError: none of them takes a setting, or several do.
    """
    # In the order of the section: settings of single operators, other than sizes.
    taken = {key for operator in (*OPERATORS.values(), *parts) for key in operator.settings}
    for key in (key for key in type(grow).model_fields if key in taken):
        value = getattr(grow, key)
        if value is None:
            continue
        value = tuple(value) if isinstance(value, list) else value
        takers = [i for i, part in enumerate(parts) if key in part.settings]
        if len(takers) != 1:
            known = [operator.name for operator in OPERATORS.values() if key in operator.settings]
            both = " and ".join(parts[i].name for i in takers)
            raise GrowthError(
                f"grow.{key}: " + (f"{both} both take it" if takers else "no operator takes it"),
                found=f"grow.operator {grow.operator}",
                expected="one of " + ", ".join(known),
                fix=f"leave grow.{key} out, or " + ("grow in two stages" if takers else
                                                     "set grow.operator to one of those"),
            )  # fmt: skip
        [at] = takers
        parts = (*parts[:at], _with(parts[at], {key: value}), *parts[at + 1 :])
    return parts


def _with(part: Operator, fields: Mapping[str, Any]) -> Operator:
    return replace(part, **fields)


def growth_in_words(grow: GrowConfig) -> str:
    """A description of a growth: ``width x2``, ``untie``, ``depth_slices of layers 0 1 0 1``."""
    parts = find_operators(grow.operator)
    words = ["+".join(part.name for part in parts)]
    if grow.sources is not None:
        words.append("of layers " + " ".join(map(str, grow.sources)))
    listed = set() if grow.sources is None else {"layers"}
    if any(set(part.sizes) - listed for part in parts):
        words.append(grow.extent)
    return " ".join(words)
