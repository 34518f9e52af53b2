"""The registry of model families."""

from __future__ import annotations

from megagrow.config import ModelConfig
from megagrow.config.families import register_architecture
from megagrow.models.family import Family
from megagrow.models.gemma2 import GEMMA2
from megagrow.models.gpt2 import GPT2
from megagrow.models.gpt_neox import GPT_NEOX
from megagrow.models.llama import LLAMA
from megagrow.models.mistral import MISTRAL
from megagrow.models.olmo2 import OLMO2
from megagrow.models.phi3 import PHI3
from megagrow.models.qwen2 import QWEN2
from megagrow.models.qwen3 import QWEN3
from megagrow.models.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, SMOLLM3, PHI3, GPT_NEOX, GEMMA2,
    )
}  # fmt: skip


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
