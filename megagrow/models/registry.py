"""The registry of model families."""

from __future__ import annotations

from megagrow.config import ModelConfig
from megagrow.config.families import register_architecture
from megagrow.models.family import Family
from megagrow.models.gpt2 import GPT2
from megagrow.models.llama import LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA)}


def register(family: Family) -> None:
    """Add a family from outside this package; adding it again has no effect.

    Every process that reads a configuration of the family must call this first.

    Raises:
        ValueError: the name is taken.
    """
    register_architecture(family.name, family.architecture)
    if FAMILIES.setdefault(family.name, family) != family:
        raise ValueError(f"there is another family {family.name!r}")


def family_of(model: ModelConfig) -> Family:
    """The family of a model."""
    return FAMILIES[model.family]
