"""Configuration of a run: schema, loading, dotted overrides."""

from megagrow.config.schema import (
    BatchConfig,
    Config,
    GrowConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    StageConfig,
    UntilConfig,
)

__all__ = [
    "BatchConfig",
    "Config",
    "GrowConfig",
    "LayoutConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "ScheduleConfig",
    "StageConfig",
    "UntilConfig",
]
