"""Configuration of a run: schema, loading, dotted overrides."""

from megagrow.config.growths import GrowConfig, GrowTarget, UntilConfig
from megagrow.config.schema import (
    BatchConfig,
    Config,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RecoveryConfig,
    ScheduleConfig,
    StageConfig,
    WatchConfig,
)

__all__ = [
    "BatchConfig",
    "Config",
    "GrowConfig",
    "GrowTarget",
    "LayoutConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "RecoveryConfig",
    "ScheduleConfig",
    "StageConfig",
    "UntilConfig",
    "WatchConfig",
]
