"""Settings of a run as plain data: merge, apply a sweep's point, compute a digest."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megagrow.config import Config
from megagrow.config.load import parse_config
from megagrow.errors import ConfigError

Settings = dict[str, Any]

# Settings that do not affect a result; all others are in the name of a run's directory.
_NO_MATTER = ("run", "watch", "checkpoint", "ops")
_MATTERS_OF_TRAIN = ("validation_samples",)
# Settings that the benchmark owns, or that define what a sample is.
_NOT_SWEPT = ("run.", "stages.", "deepspeed.", "data.")


def own_value(whole: Settings, name: str, values: Sequence[Any], *, key: str) -> Any:
    """A setting's own value, which must be among the swept ones."""
    found: Any = whole
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found or name.startswith(_NOT_SWEPT):
            raise ConfigError(
                f"{key}.{name}: no setting of a run that can be swept",
                expected="a dotted name such as optimizer.lr, batch.global or model.init_std",
            )
        found = found[part]
    if found not in values:
        raise ConfigError(
            f"{key}.{name}: lacks the target's own value, which the sweep starts from",
            found=", ".join(map(str, values)),
            expected=f"{found} among them",
            fix=f"add {found} to {key}.{name}, or set target.{name} to one of its values",
        )
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """A copy of `base` with `changes` written over it, section by section."""
    found = copy.deepcopy(dict(base))
    for key, value in changes.items():
        old = found.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        found[key] = merged(old or {}, value) if both else copy.deepcopy(value)
    return found


def at_point(settings: Settings, point: Mapping[str, Any]) -> Settings:
    """Settings with the values of a sweep.

    A swept `batch.global` uses the largest micro-batch that divides both it and the target's:
    a micro-batch changes memory and speed, but no result.
    """
    for name, value in point.items():
        nested: Settings = {}
        inner: Any = nested
        *sections, last = name.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
        settings = merged(settings, nested)
    batch = settings.get("batch", {})
    if "batch.global" in point and "batch.micro" not in point and "micro" in batch:
        batch["micro"] = math.gcd(point["batch.global"], batch["micro"])
    return settings


def parsed(settings: Settings) -> Config:
    """Parse settings into a configuration, whatever the run's length."""
    stages = copy.deepcopy(settings.get("stages", [{}]))
    for stage in stages:
        if stage.pop("share", None) is not None or stage is stages[-1]:
            stage["until"] = {"steps": 1}
    return parse_config({**settings, "stages": stages}, source="savings")


def whole(settings: Settings) -> Settings:
    """Settings with all defaults filled in."""
    return parsed(settings).model_dump(mode="json", by_alias=True)


def digest(settings: Settings) -> str:
    """A digest of everything that a result depends on; settings at their default do not count."""
    kept = parsed(settings).model_dump(mode="json", by_alias=True, exclude_defaults=True)
    kept = {key: value for key, value in kept.items() if key not in _NO_MATTER}
    train = kept.pop("train", {})
    kept["train"] = {key: train[key] for key in _MATTERS_OF_TRAIN if key in train}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
