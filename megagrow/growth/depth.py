"""Depth growth: more layers.

`depth_stack` appends whole copies of the layer stack, M o M o ... o M, the
operator that "Stacking Your Transformers" (Du et al., arXiv 2405.15319, where
it is called G_stack) found to save most, after Gong et al. (ICML 2019).  The
function changes, so the loss jumps and is soon lower than it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.growth.operator import Block, same
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.statemap import Fill

_LAYERS = "layers."


@dataclass(frozen=True)
class DepthStack:
    """Append copies of all layers; layer i of the grown model is layer i mod L of the old."""

    name: str = "depth_stack"
    summary: str = "copies of all layers appended, any factor"
    keeps: str = "nothing"
    breaker: str = "copies sit at different depths, so their gradients differ"
    source: str = "Gong et al., ICML 2019; Du et al., arXiv 2405.15319"
    policies: tuple[str, ...] = ("copy", "reset")

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """Layers times the factor."""
        return model.model_copy(update={"layers": model.layers * factor})

    def blocks(self, tensor: LogicalTensor, small: Catalog) -> tuple[Block, ...]:
        """One block, the whole tensor, from the layer that is copied."""
        axes = tuple(same(n) for n in tensor.shape)
        if not tensor.name.startswith(_LAYERS):
            return (Block(tensor.name, axes),)
        layer, rest = layer_of(tensor.name)
        depth = layer_count(small)
        return (Block(f"{_LAYERS}{layer % depth}.{rest}", axes, new=layer >= depth),)

    def fill(self, tensor: LogicalTensor) -> Fill:
        """The copies cover everything."""
        return "covered"


def layer_of(name: str) -> tuple[int, str]:
    """``layers.3.mlp.up.weight`` -> (3, ``mlp.up.weight``)."""
    number, _, rest = name.removeprefix(_LAYERS).partition(".")
    return int(number), rest


def layer_count(catalog: Catalog) -> int:
    """Number of layers of a model."""
    return 1 + max(layer_of(t.name)[0] for t in catalog if t.name.startswith(_LAYERS))
