"""The state of fp16's dynamic loss scaling, which is part of the run's state."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

LossScale = dict[str, float]


def get_loss_scale(engine: Any) -> LossScale:
    """The numbers that determine the future loss scale; empty without dynamic scaling."""
    scaler = _scaler(engine)
    if scaler is None:
        return {}
    return {name: float(getattr(scaler, name)) for name in _FIELDS if hasattr(scaler, name)}


def set_loss_scale(engine: Any, state: LossScale) -> None:
    """Restore another engine's numbers; keys that only one of the two has are left unchanged."""
    scaler = _scaler(engine)
    if scaler is None:
        return
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value if name == "cur_scale" else int(value))


def _scaler(engine: Any) -> Any | None:
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        config = engine.optimizer.loss_scale_config
        return config if config.dynamic_loss_scale else None
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
