"""A family that is not part of megagrow, entirely in this folder; `register()` adds it.

RMSNorm, learned positions, an ungated SiLU, no biases, and blocks whose attention and MLP read the
same stream in parallel.
"""

import torch

from megagrow.config.families import Architecture
from megagrow.models import registry
from megagrow.models.common.blocks import Block, Embedding, Head
from megagrow.models.family import Family
from tests.models.toy_family.huggingface import HUGGINGFACE


def _check(model):
    if model.dropout:
        raise ValueError("a toy has no dropout; leave model.dropout out")


class ParallelBlock(Block):
    """x + attention(x) + mlp(x)."""

    def _apply_layers(self, x: torch.Tensor) -> torch.Tensor:
        y, x = self.mlp(torch.zeros_like(x), x)
        return x + y + self.attention(x)


def _layers(model):
    return [Embedding, *[ParallelBlock] * model.layers, Head]


TOY = Family(
    name="toy",
    architecture=Architecture(
        norm="rms", positions="learned", gated=False, biases=False, activation="silu", check=_check
    ),
    layers=_layers,
    huggingface=HUGGINGFACE,
)


def register(*_):
    """Called by tests, and by each rank of a job as its hook."""
    registry.register(TOY)
