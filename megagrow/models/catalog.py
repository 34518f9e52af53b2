"""The logical tensors of a model configuration, in the order of its layer list."""

from __future__ import annotations

from megagrow.config import ModelConfig
from megagrow.models.registry import family_of
from megagrow.state.catalog import Catalog


def build_catalog(model: ModelConfig) -> Catalog:
    """All tensors of a model, as defined by its family: shapes, axes, roles, initialisation.

    Raises:
        ValueError: the vocabulary size is unset.
    """
    return family_of(model).catalog(model)
