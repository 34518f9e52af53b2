"""Arithmetic of a run over its steps: the learning rate and the growth stages."""

from megagrow.schedule.learning_rate import LearningRate, Rewarm, learning_rate
from megagrow.schedule.stages import StagePlan, resolve_stages, stage_of

__all__ = [
    "LearningRate",
    "Rewarm",
    "StagePlan",
    "learning_rate",
    "resolve_stages",
    "stage_of",
]
