"""Configuration of a run: schema, loading, dotted overrides."""

from megagrow.config.growths import GrowConfig, GrowTarget, Trained, UntilConfig
from megagrow.config.model import InitConfig, ModelConfig
from megagrow.config.schema import (
    BatchConfig,
    Config,
    LayoutConfig,
    OptimizerConfig,
    PrecisionConfig,
    RecoveryConfig,
    ScheduleConfig,
    StageConfig,
    WatchConfig,
)
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
