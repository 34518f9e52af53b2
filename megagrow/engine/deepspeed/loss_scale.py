"""The state of fp16's dynamic loss scaling, which is part of the run's state."""

from __future__ import annotations

from typing import Any

from megagrow.engine.deepspeed.privates import SCALE_FIELDS, loss_scaler

LossScale = dict[str, float]


def get_loss_scale(engine: Any) -> LossScale:
    """The numbers that determine the future loss scale; empty without dynamic scaling."""
    scaler = loss_scaler(engine)
    if scaler is None:
        return {}
    return {name: float(getattr(scaler, name)) for name in SCALE_FIELDS if hasattr(scaler, name)}


def set_loss_scale(engine: Any, state: LossScale) -> None:
    """Restore another engine's numbers; keys that only one of the two has are left unchanged."""
    scaler = loss_scaler(engine)
    if scaler is None:
        return
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value if name == "cur_scale" else int(value))
