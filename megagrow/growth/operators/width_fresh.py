"""`width_fresh`: new units that read at random and write nothing yet; no copies are made.

With h the residual stream, the grown stream is h' = [h, 0]:

    embeddings            E' = [E, 0]
    readers of the stream W' = [[W, R], [R, R]]     q, k, v, gate, up, an untied head
    writers to it         W' = [[W, 0], [0, 0]]     o, down
    gains of its norms    g' = [g, mean(g)] sqrt(H/H'),  eps' = eps H/H'

R is normal, as large as the trained tensor (its own root mean square).  RMSNorm divides by a root
mean square that has fallen by sqrt(H/H'), which its gains and its eps take back, so every old unit
computes what it did.  A tied head needs nothing: its new columns are 0.

LayerNorm subtracts the mean, which zeros would move; there the stream is padded with its own mean,
h' = [h, mean(h), ...]: new columns of embeddings, and of writers and their biases, are the mean of
the old ones.  The mean stays, the variance falls by H/H', the normalised new units are 0, and so
are the new elements of the norm's bias.

Gradients.  New units of an RMSNorm are 0 and enter no sum of its backward pass, so the grown model
has the old gradients; those of gains are multiplied by sqrt(H'/H), as what they scale is.
LayerNorm's backward pass mixes new units in: with a wider stream the gradients of the head and of
the norm before it are exact multiples, no others.  Writers are 0 but readers are not, so new
elements of writers and embeddings have a gradient at once, and readers from the second step on.

Why not copies: twins have one gradient, and AdamW parts them slowly (docs/growth-operators.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.growth.operator import Block, Operator, resized
from megagrow.growth.operators.ramp import beside
from megagrow.growth.operators.width import WIDTH_SIZES
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.roles import FINAL_NORM, GAINS, NORMS
from megagrow.transfer.state_map import AxisMap, Drawn, Fill, Level, Statistic


@dataclass(frozen=True, kw_only=True)
class WidthFresh(Operator):
    """Fresh readers, silent writers, a padded stream; any larger size of each axis."""

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """The sizes, and an eps of the norms that falls as the mean square of the stream does."""
        wide = resized(model, sizes)
        if wide.hidden == model.hidden:
            return wide
        return wide.model_copy(update={"norm_eps": model.norm_eps * model.hidden / wide.hidden})

    def blocks(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[Block, ...]:
        """The old elements."""
        old = small[tensor.name]
        param, grad = 1.0, 1.0
        if tensor.role in GAINS:
            param = math.sqrt(old.volume / tensor.volume)
            grad = 1 / param
        behind = tensor.role in FINAL_NORM or tensor.role == "head"
        mixed = small.centred and _widened(small, target) and not behind
        stated = None if mixed else grad
        return (Block(tensor.name, beside(tensor, old), param, stated),)

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """Readers at random, a mean for gains and a centred stream, zeros for the rest."""
        old = small[tensor.name]
        if "embed" in tensor.reads:
            own = Statistic(old.name, old.shape, "rms")
            # The shape sets the numbers apart from those that the tensor began with.
            return Drawn(f"{tensor.name} {list(tensor.shape)}", 1.0, own)
        if "embed" not in tensor.axes or not _widened(small, target):
            return "zeros"
        at = tensor.axes.index("embed")
        n, large = old.shape[at], tensor.shape[at]
        axes = list(beside(tensor, old))
        axes[at] = AxisMap(n, 1, 0, 1, large - n)
        if tensor.role in GAINS:
            mean = Statistic(old.name, old.shape, "mean")
            return Level(mean, tuple(axes), math.sqrt(n / large))
        if small.centred and tensor.role not in NORMS:
            return Level(Statistic(old.name, old.shape, "mean", axis=at), tuple(axes))
        return "zeros"


WIDTH_FRESH = WidthFresh(
    name="width_fresh",
    summary="new units read at random and write 0; the stream is padded: [[W, 0], [R, R]]",
    keeps="loss",
    breaker="no copies are made",
    source="derived here; fresh units as in MSG, Yao et al., arXiv 2305.02869, without its mask",
    policies=("kept", "sparkling", "reset"),
    sizes=WIDTH_SIZES,
    any_size=True,
)


def _widened(small: Catalog, target: Catalog) -> bool:
    """Whether the residual stream grows."""
    old, new = small.of("final_norm_gain"), target.of("final_norm_gain")
    return old is None or new is None or old.shape != new.shape
