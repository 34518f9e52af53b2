"""A family that is not part of megagrow, entirely in this folder; `register()` adds it.

RMSNorm, learned positions, an ungated SiLU, no biases, and blocks whose attention and MLP read the
same stream in parallel.
"""

from typing import Any

import torch

from megagrow.config import ModelConfig
from megagrow.config.families import Architecture
from megagrow.models import registry
from megagrow.models.common.blocks import Block, Embedding, Head, Layer
from megagrow.models.common.documents import Documents
from megagrow.models.family import Family
from tests.models.toy_family.huggingface import HUGGINGFACE


def _check(model: Any) -> None:
    if model.dropout:
        raise ValueError("a toy has no dropout; leave model.dropout out")


class ParallelBlock(Block):
    """x + attention(x) + mlp(x)."""

    def _apply_layers(self, x: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        y, x = self.mlp(torch.zeros_like(x), x)
        return x + y + self.attention(x, documents)


def _layers(model: ModelConfig) -> list[Layer]:
    return [Embedding, *[ParallelBlock] * model.layers, Head]


TOY = Family(
    name="toy",
    architecture=Architecture(
        norm="rms", positions="learned", gated=False, biases="none", activation="silu", check=_check
    ),
    layers=_layers,
    huggingface=HUGGINGFACE,
    documents=True,
)


def register(*_: object) -> None:
    """Called by tests, and by each rank of a job as its hook."""
    registry.register(TOY)
