"""Configuration of a run: schema, loading, dotted overrides."""

from megagrow.config.schema import (
    BatchConfig,
    Config,
    GrowConfig,
    GrowTarget,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RecoveryConfig,
    ScheduleConfig,
    StageConfig,
    UntilConfig,
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
