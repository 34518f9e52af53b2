"""`untie`: the output head gets its own weight, initialised from the embedding.

The function is preserved. The tied tensor's gradient was the sum of the embedding's and the head's;
afterwards each has its own, so no multiple of the old one is stated for either, and both inherit
the moments of the sum. The model gains parameters, but no FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.growth.operator import GrowthBlock, Operator, resized, unchanged
from megagrow.state.catalog import Catalog, LogicalTensor


@dataclass(frozen=True, kw_only=True)
class Untie(Operator):
    """An untied head; nothing else changes."""

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """The model with `tie_embeddings` false."""
        return resized(model, sizes).model_copy(update={"tie_embeddings": False})

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """Every tensor unchanged; a new head is copied from the embedding."""
        table, tied = small.of("embedding"), small.of("head") is None
        if table is not None and tied and tensor.role in ("embedding", "head"):
            return (GrowthBlock(table.name, unchanged(tensor, table), new=tensor.role == "head"),)
        return (GrowthBlock(tensor.name, unchanged(tensor, small[tensor.name]), grad=1.0),)


UNTIE = Untie(
    name="untie",
    summary="the tied output head becomes a tensor of its own, a copy of the embedding",
    keeps="loss",
    breaker="embedding and head have different gradients",
    source="modded-nanogpt, PR 178 (untied at 2/3 of the training, moments copied)",
    policies=("copy", "reset"),
    sizes=(),
)
