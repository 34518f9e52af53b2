"""Dotted overrides of a configuration: `optimizer.lr=1e-3`, `stages.1.until.tokens=5e5`."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from megagrow.config.yamltext import read_yaml
from megagrow.errors import ConfigError

_KEY = re.compile(r"^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*|\.[0-9]+|\[[0-9]+\])*$")
_EXAMPLE = "for instance  optimizer.lr=1e-3  or  stages.1.until.tokens=5e5"


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `key.sub=value` set, in order.

    The value is parsed as YAML, so `stages=[{until: {steps: 5}}]` replaces the whole list.
    Missing sections are created; a list index (`stages.1` or `stages[1]`) must exist.
    Unknown keys are not detected here; the schema does that.

    Raises:
        ConfigError: the override has no `=`, no proper key, a value that is not YAML, or
            indexes into a scalar.
    """
    result = copy.deepcopy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.match(key):
            raise ConfigError(
                f"override {override!r} is not understood",
                found=repr(override),
                expected=f"key.sub=value, without spaces round '='; {_EXAMPLE}",
            )
        _set(result, key, read_yaml(text, source=f"override {override!r}"))
    return result


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `key` in nested dicts and lists, in place."""
    parts = key.replace("[", ".").replace("]", "").split(".")
    here: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        where = ".".join(parts[:depth])
        if isinstance(here, list):
            slot: Any = _index(part, here, key=key, where=where)
        elif isinstance(here, dict):
            slot = part
        else:
            raise ConfigError(
                f"override {key}=...: {where} holds one value, nothing can be set inside it",
                found=repr(here),
                expected="a section or a list",
            )
        if last:
            here[slot] = value
            return
        if isinstance(here, dict) and here.get(slot) is None:
            here[slot] = {}  # an absent or empty section
        here = here[slot]


def _index(part: str, items: list[Any], *, key: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        last = f"0 to {len(items) - 1}" if items else "none: the list is empty"
        raise ConfigError(
            f"override {key}=...: {where} is a list and has no item {part!r}",
            found=part,
            expected=f"an index, {last}",
            fix=f"to change the length, give the whole list: {where}=[...]",
        )
    return int(part)
