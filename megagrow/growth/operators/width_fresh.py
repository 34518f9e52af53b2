"""`width_fresh`: new units with random readers and zero writers; no copies are made.

With h the residual stream, the grown stream is h' = [h, 0]:

    embeddings            E' = [E, 0]
    readers of the stream W' = [[W, R], [R, R]]     q, k, v, gate, up, an untied head
    writers to it         W' = [[W, 0], [0, 0]]     o, down
    gains of its norms    g' = [g, mean(g)] sqrt(H/H'),  eps' = eps H/H'

R is normal, with the root mean square of the trained tensor. RMSNorm divides by a root mean square
that has changed by sqrt(H/H'), which its gains and its eps compensate, so every old unit computes
the same as before. A tied head needs no change: its new columns are 0.

LayerNorm subtracts the mean, which zeros would change; there the stream is padded with its own
mean, h' = [h, mean(h), ...]: new columns of embeddings, and of writers and their biases, are the
mean of the old ones. The mean is unchanged, the variance is multiplied by H/H', the normalised new
units are 0, and so are the new elements of the norm's bias.

Norms after a sub-layer see [f, 0], so the same holds for them. If embeddings are multiplied by the
square root of the width (Gemma), the old units of the stream grow by sqrt(H'/H), and its root mean
square is unchanged, and so is eps. What blocks write grows as much if norms after sub-layers keep
their gains. That is exact but for the eps of these norms.

Gradients. New units of an RMSNorm are 0 and contribute nothing to its backward pass, so the grown
model has the old gradients; those of gains are multiplied by sqrt(H'/H), like the values that they
scale. LayerNorm's backward pass mixes in the new units: with a wider stream only the gradients of
the head and of the norm before it are exact multiples.  Writers are 0 but readers are not, so new
elements of writers and embeddings have a gradient at the first step, and readers from the second
step on.

Why not copies: twins have equal gradients, and AdamW separates them slowly
(docs/growth-operators.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.growth.operator import GrowthBlock, Operator, resized
from megagrow.growth.operators.ramp import beside
from megagrow.growth.operators.width import WIDTH_SIZES
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.roles import FINAL_NORM, GAINS, NORMS
from megagrow.transfer.state_map import AxisMap, Drawn, Fill, Level, Statistic


@dataclass(frozen=True, kw_only=True)
class WidthFresh(Operator):
    """Fresh readers, silent writers, a padded stream; any larger size of each axis."""

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """The sizes, and `norm_eps` scaled like the mean square of the stream."""
        wide = resized(model, sizes)
        if wide.hidden == model.hidden or model.architecture.scaled_embedding:
            return wide
        changed = {"norm_eps": model.norm_eps * model.hidden / wide.hidden}
        if model.architecture.head_norm is not None:  # heads are as wide as before
            changed["head_norm_eps"] = model.head_norm_eps or model.norm_eps
        return wide.model_copy(update=changed)

    def departure(self, small: Catalog, target: Catalog) -> str | None:
        """Norms behind sub-layers keep an eps that should shrink with their input."""
        if not _widened(small, target) or not any(t.role == "post_norm_gain" for t in target):
            return None
        return (
            "norms after sub-layers keep their eps, which should shrink with their input: logits "
            "change by about eps relative to its mean square"
        )

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """The old elements."""
        old = small[tensor.name]
        param, grad = 1.0, 1.0
        if tensor.role in GAINS:
            param = _gain(tensor, old, small)
            grad = 1 / param
        behind = tensor.role in FINAL_NORM or tensor.role == "head"
        mixed = small.centred and _widened(small, target) and not behind
        stated = None if mixed else grad
        return (GrowthBlock(tensor.name, beside(tensor, old), param, stated),)

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """Random readers, the mean for gains and a centred stream, zeros for the rest."""
        old = small[tensor.name]
        if "embed" in tensor.reads:
            own = Statistic(old.name, old.shape, "rms")
            # The shape in the name makes the numbers differ from the tensor's initial values.
            return Drawn(f"{tensor.name} {list(tensor.shape)}", 1.0, own)
        if "embed" not in tensor.axes or not _widened(small, target):
            return "zeros"
        at = tensor.axes.index("embed")
        n, large = old.shape[at], tensor.shape[at]
        axes = list(beside(tensor, old))
        axes[at] = AxisMap(n, 1, 0, 1, large - n)
        if tensor.role in GAINS:
            mean = Statistic(old.name, old.shape, "mean")
            return Level(mean, tuple(axes), _gain(tensor, old, small))
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
    handles=frozenset({"norm after", "scaled embedding"}),
)


def _gain(tensor: LogicalTensor, old: LogicalTensor, small: Catalog) -> float:
    """The factor of a norm's gains."""
    if small.scaled and tensor.role == "post_norm_gain":
        return 1.0
    return math.sqrt(old.volume / tensor.volume)


def _widened(small: Catalog, target: Catalog) -> bool:
    """Whether the residual stream grows."""
    old, new = small.of("final_norm_gain"), target.of("final_norm_gain")
    return old is None or new is None or old.shape != new.shape
