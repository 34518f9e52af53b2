"""The learning rate and the growth stages of a run as functions of the step."""

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
