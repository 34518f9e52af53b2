"""The metadata that megagrow stores in other formats, so that a run can be restored from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "megagrow"  # an extra key, as clients of DeepSpeed's engine add them
FROZEN = "frozen"  # in it: the tensors that the optimizer does not have, whose files may not say so


def client_state(head: Mapping[str, Any]) -> dict[str, Any]:
    """Read what our sink or a run's client state stored.

    Returns:
        config, run_state, fingerprints, step and frozen.
    """
    entries = head.get(KEY)
    entries = entries if isinstance(entries, dict) else {}
    parts = ("config", "run_state", "fingerprints")
    found = {key: entries[key] if isinstance(entries.get(key), dict) else {} for key in parts}
    frozen = entries.get(FROZEN)
    return {
        **found,
        "step": entries["step"] if type(entries.get("step")) is int else None,
        FROZEN: frozenset(map(str, frozen)) if isinstance(frozen, list) else frozenset(),
    }


def plain_json(value: Any) -> Any:
    """Convert to plain dictionaries and lists where JSON holds them."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return value
