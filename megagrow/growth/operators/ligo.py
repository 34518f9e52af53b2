"""`ligo`: learned linear maps from the small model's parameters to the large one's.

"Learning to Grow Pretrained Models" (Wang et al., arXiv 2303.00980).  A layer of the grown model
is a learned sum of the small model's layers, each widened by learned maps: W' = sum_l w_l B W A^T.
Only the maps are fitted, on the language-modelling loss, for a few hundred steps; applied to the
small parameters they give the initial parameters of the large model.

Maps act on whole units, axis by axis: separate ones for the residual stream where it is written,
read and normalised; in each layer one for the heads (separate for queries, keys and values) and one
for the ffn units, where they are written and where they are read. The paper ties reading to writing
and also mixes the features inside heads, which is incompatible with rotary positions.

The fitting starts from stacked copies of the tiled model, so for width alone it starts at the small
model's loss. The fitting loop is in `megagrow.train.fit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megagrow.growth.operator import GrowthBlock, Operator, growth_factor
from megagrow.growth.operators.depth import stacked
from megagrow.growth.operators.width import (
    GROWING,
    WIDTH_SIZES,
    copies_along,
    duplicates,
    equal_shares,
    is_new,
)
from megagrow.state.catalog import Catalog, LogicalTensor, Slot, of_layer
from megagrow.state.roles import FINAL_NORM, NORMS
from megagrow.transfer.state_map import Copy, Fill, Identity

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Ligo(Operator):
    """Learned maps; the blocks are the initial values of the fitting."""

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """Tiled copies of stacked layers."""
        source, new = stacked(tensor, small)
        return tuple(
            GrowthBlock(
                source,
                one.axes,
                param=equal_shares(tensor, one)[0],
                new=new or is_new(one),
            )
            for one in duplicates(tensor, small[source])
        )


LIGO = Ligo(
    name="ligo",
    summary="learned sums of layers and maps of units, fitted on data before the training goes on",
    keeps="nothing",
    breaker="the maps are fitted, and no two copies have the same",
    source="LiGO, Wang et al., arXiv 2303.00980",
    policies=("reset",),
    sizes=(*WIDTH_SIZES, "layers"),
    fitted=200,
)


class Maps(nn.Module):
    """The learned maps of one growth: small parameters in, large parameters out.

    Args:
        small, target: the catalogs before and after.
    """

    def __init__(self, small: Catalog, target: Catalog) -> None:
        super().__init__()
        self._small = small
        self._kinds = [t.inner for t in small if t.layer == 0]
        self.units = nn.ParameterDict()
        for old in small:
            tensor = target[old.name]
            for part in _parts(old):
                for at, key in _mapped_axes(old, part):
                    n, large = old.shape[at], tensor.shape[at]
                    if old.axes[at] == "projection":
                        n, large = n - 2, large - 2
                    if n != large and key not in self.units:
                        self.units[key] = nn.Parameter(_first_map(tensor, at, n, large))
        first, last = small.layers, target.layers
        stack = torch.eye(first).repeat(-(-last // first), 1)[:last]
        self.layers = nn.ParameterDict(
            {_key(kind): nn.Parameter(stack.clone()) for kind in self._kinds}
        )

    def forward(self, parameters: Tensors) -> dict[str, torch.Tensor]:
        """Parameters of the large model, by name, from those of the small one."""
        wide = {tensor.name: self._widened(tensor, parameters[tensor.name])
                for tensor in self._small}  # fmt: skip
        for kind in self._kinds:
            old = [wide.pop(of_layer(i, kind)) for i in range(self._small.layers)]
            grown = torch.tensordot(self.layers[_key(kind)], torch.stack(old), dims=1)
            wide |= {of_layer(i, kind): values for i, values in enumerate(grown)}
        return wide

    def _widened(self, tensor: LogicalTensor, values: torch.Tensor) -> torch.Tensor:
        parts = [values]
        if "projection" in tensor.axes:
            parts = list(values.split((values.shape[1] - 2, 1, 1), dim=1))
        for number, part in enumerate(_parts(tensor)):
            for at, key in _mapped_axes(tensor, part):
                if key in self.units:
                    along = parts[number].movedim(at, -1) @ self.units[key].t()
                    parts[number] = along.movedim(-1, at)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _parts(tensor: LogicalTensor) -> tuple[str, ...]:
    """Queries, keys and values have separate maps."""
    return ("q", "k", "v") if "projection" in tensor.axes else ("",)


def _mapped_axes(tensor: LogicalTensor, part: str) -> Iterator[tuple[int, str]]:
    """The axes of (a part of) a tensor that may have a map, and the map's name."""
    layer = tensor.name.rpartition(".")[0]  # shared by a matrix and its bias
    for at, axis in enumerate(tensor.axes):
        if axis == "embed":
            yield at, _stream_map(tensor)
        elif axis in GROWING or (axis == "projection" and part == "q"):
            yield at, _key(f"{layer}.{axis}.{part}")


def _stream_map(tensor: LogicalTensor) -> str:
    """The name of a stream map: all layers share the maps that write, normalise and read it."""
    if tensor.role in NORMS:
        return "final_norm" if tensor.role in FINAL_NORM else "norm"
    if tensor.role == "head":
        return "output"
    return "read" if "embed" in tensor.reads else "write"


def _first_map(tensor: LogicalTensor, at: int, n: int, large: int) -> torch.Tensor:
    """[large, n]: copies, read with equal weights (see `equal_shares`)."""
    axis = "query" if tensor.axes[at] == "projection" else tensor.axes[at]
    k = growth_factor(large, n, f"{tensor.name}, axis {axis}")
    result = torch.zeros(large, n)
    for copy in copies_along(axis, n, k):
        there = copy.target_start + torch.arange(n) * copy.target_step
        result[there, torch.arange(n)] = 1.0
    shared = axis in tensor.reads and tensor.role != "head"
    return result / k if shared or tensor.role in FINAL_NORM else result


def _key(name: str) -> str:
    return name.replace(".", "-").rstrip("-")


@dataclass(frozen=True)
class Fitted:
    """The state map from fitted parameters to the state of a run: moments start at 0."""

    target: Catalog

    def copies(self, tensor: LogicalTensor, slot: Slot) -> Sequence[Copy]:
        """The whole tensor if the slot is the parameter."""
        return Identity(self.target).copies(tensor, slot) if slot.kind == "parameter" else ()

    def fill(self, tensor: LogicalTensor, slot: Slot) -> Fill:
        """Zero optimizer state."""
        return "covered" if slot.kind == "parameter" else "zeros"
