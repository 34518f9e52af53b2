"""`shrink_pad_perturb`: old weights are shrunk, padded, and perturbed with the init std.

    W' = s [[W, 0], [0, 0]] + N(0, init_std^2)     matrices
    E' = [s E, fresh]                              embeddings, an untied head
    g' = [g, 1]                                    gains of norms
    b' = [s b, 0]                                  biases; those of norms [b, 0]

Mallik et al., arXiv 2411.07340 and 2605.13405, after the shrink-and-perturb of Ash and Adams
(arXiv 1910.08475).  The function is not preserved: they find that a simple start near an
initialisation trains as well as one that preserves the loss, best below 20 tokens per parameter and
at twice the size. Moments and step counts are reset.
"""

from __future__ import annotations

from dataclasses import dataclass

from megagrow.growth.operator import GrowthBlock, Operator
from megagrow.growth.operators.ramp import beside
from megagrow.growth.operators.width import WIDTH_SIZES
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.roles import NORMS
from megagrow.transfer.state_map import Fill, Noise


@dataclass(frozen=True, kw_only=True)
class ShrinkPadPerturb(Operator):
    """Any larger width of each axis.

    Attributes:
        shrink: the factor of old weights.
    """

    shrink: float = 0.4

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """The old elements; in matrices with noise of the init std."""
        noise = None
        if tensor.is_matrix:
            noise = Noise(f"{tensor.name} {list(tensor.shape)} perturbed", tensor.init.std)
        param = 1.0 if tensor.role in NORMS else self.shrink
        return (GrowthBlock(tensor.name, beside(tensor, small[tensor.name]), param, noise=noise),)

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """New units are initialised as at the start of a run."""
        return "fresh"


SHRINK_PAD_PERTURB = ShrinkPadPerturb(
    name="shrink_pad_perturb",
    summary="old weights times grow.shrink (0.4), noise as of an initialisation, new units fresh",
    keeps="nothing",
    breaker="no copies are made",
    source="Mallik et al., arXiv 2605.13405 and 2411.07340",
    policies=("reset",),
    sizes=WIDTH_SIZES,
    any_size=True,
    handles=frozenset({"norm after", "norm of all heads", "scaled embedding"}),  # promises nothing
    settings=("shrink",),
)
