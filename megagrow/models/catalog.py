"""The logical tensors of a model configuration, in the order of its layer list."""

from __future__ import annotations

from megagrow.config import ModelConfig
from megagrow.models.registry import family_of
from megagrow.state.catalog import Catalog


def build_catalog(model: ModelConfig) -> Catalog:
    """All tensors of a model, with shapes, axes, roles and initialisation, as its family has them.

    Raises:
        ValueError: the vocabulary size is not known yet.
    """
    return family_of(model).catalog(model)
