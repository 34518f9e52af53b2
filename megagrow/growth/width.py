"""Width growth: more units in every layer, the same function.

`width` tiles.  With h the residual stream, the grown stream is [h, h, ...]
(k copies), and every matrix that reads a grown axis and writes another is
[[W, W], [W, W]] / k: each output unit sums k equal contributions of W h / k.
Embeddings, norms and biases are repeated, and the final norm is divided by k,
because the output head sums over k copies of the stream.  LayerNorm sees the
same mean and variance, so the loss is kept exactly.

Source: HyperCloning (Samragh et al., arXiv 2409.12903) for the tiling; the
state policies and gradients: megagrow's laws 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from megagrow.config import ModelConfig
from megagrow.growth.operator import Block, growth_factor, repeated, same, tiled
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.statemap import AxisMap, Fill

# The residual stream is one vector that all layers share, so its copies lie end to end; heads
# and ffn units may be permuted layer by layer, so theirs lie beside their source.
_TILED = frozenset({"embed"})
_REPEATED = frozenset({"kv_group", "ffn"})


@dataclass(frozen=True)
class Width:
    """Tile every matrix; heads, hidden and ffn grow by the factor, head_dim stays."""

    name: str = "width"
    summary: str = "every matrix [[W, W], [W, W]] / k; heads, hidden and ffn by k"
    keeps: str = "loss"
    breaker: str = "sparkling: old and new blocks differ in moments and learning rate"
    source: str = "HyperCloning, arXiv 2409.12903; SPARKLING, arXiv 2602.02472"
    policies: tuple[str, ...] = ("sparkling", "exact", "reset")

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """Hidden, heads and ffn times the factor."""
        return model.model_copy(
            update={
                "hidden": model.hidden * factor,
                "heads": model.heads * factor,
                "ffn": model.ffn * factor,
            }
        )

    def blocks(self, tensor: LogicalTensor, small: Catalog) -> tuple[Block, ...]:
        """All copies of all grown axes."""
        old = small[tensor.name]
        per_axis: list[list[AxisMap]] = []
        factors = []
        for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
            if meaning in _TILED or meaning in _REPEATED:
                k = growth_factor(large, n, f"{tensor.name}, axis {meaning}")
                per_axis.append(tiled(n, k) if meaning in _TILED else repeated(n, k))
                factors.append(k)
            else:
                per_axis.append([same(n)])
        param, grad = _coefficients(tensor, factors)
        return tuple(
            Block(tensor.name, axes, param=param, grad=grad, new=i > 0)
            for i, axes in enumerate(product(*per_axis))
        )

    def fill(self, tensor: LogicalTensor) -> Fill:
        """The copies cover everything."""
        return "covered"


def _coefficients(tensor: LogicalTensor, factors: list[int]) -> tuple[float, float]:
    """(param, grad) of every block of a tensor whose grown axes grew by `factors`.

    The gradient that reaches a copy of the stream is 1/k of the old one, because the final
    norm is divided by k; the final norm itself sees the whole gradient of the head.
    """
    k = factors[0]
    if tensor.name.startswith("final_norm."):
        return 1.0 / k, 1.0
    reads_and_writes = len(factors) == 2
    return (1.0 / k if reads_and_writes else 1.0), 1.0 / k
