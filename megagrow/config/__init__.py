"""Configuration of a run: schema, loading, dotted overrides."""

from megagrow.config.growths import GrowConfig, GrowTarget, Trained, UntilConfig
from megagrow.config.loop import RecoveryConfig, WatchConfig
from megagrow.config.model import InitConfig, ModelConfig
from megagrow.config.optimization import (
    BatchConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
)
from megagrow.config.schema import Config, LayoutConfig, StageConfig
from megagrow.config.start import StartConfig

__all__ = [
    "BatchConfig",
    "Config",
    "GrowConfig",
    "GrowTarget",
    "InitConfig",
    "LayoutConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "RecoveryConfig",
    "ScheduleConfig",
    "StageConfig",
    "StartConfig",
    "Trained",
    "UntilConfig",
    "WatchConfig",
]
