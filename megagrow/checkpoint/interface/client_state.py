"""What a run leaves in a checkpoint of another format, so that it can be read back as a run's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

KEY = "megagrow"  # beside the format's own entries, as a client of DeepSpeed's engine adds them

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def client_state(head: Mapping[str, Any]) -> dict[str, Any]:
    """What our own sink (or a run's client state) left: config, run_state, fingerprints, step."""
    told = head.get(KEY)
    told = told if isinstance(told, dict) else {}
    parts = ("config", "run_state", "fingerprints")
    found = {key: told[key] if isinstance(told.get(key), dict) else {} for key in parts}
    return {**found, "step": told["step"] if type(told.get("step")) is int else None}


def plain_json(value: Any) -> Any:
    """What JSON holds, with dictionaries and lists as such."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return value
