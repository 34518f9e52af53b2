"""`depth_slices`: the grown model's layers from a list, or copies of the middle layers only.

    sources: [0, 1, 2, 3, 2, 3, 4, 5]   layer i of the grown model is layer sources[i] of the old
    keep_first, keep_last: 1            the first and the last layer once, those between stacked

The list is what merging tools call slices: SOLAR (Kim et al., arXiv 2312.15166) puts layers 0 to 23
before layers 8 to 31.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.operators.depth import Copies, Listed, of_first_use
from megagrow.state.catalog import Catalog, LogicalTensor


@dataclass(frozen=True, kw_only=True)
class DepthSlices(Copies, Listed):
    """Copies of chosen layers.

    Attributes:
        keep_first, keep_last: without `sources`, the number of layers at either end that are not
            copied.
    """

    keep_first: int = 0
    keep_last: int = 0

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """As many layers as are listed, or named.

        Raises:
            GrowthError: the list names layers that do not exist, leaves some out, or conflicts with
                other settings.
        """
        if self.sources is None:
            if self.keep_first + self.keep_last >= model.layers:
                raise GrowthError(
                    "grow.keep_first and grow.keep_last leave no layer to copy",
                    found=f"{self.keep_first} and {self.keep_last} of {model.layers} layers",
                    expected=f"a sum below {model.layers}",
                    fix="set them lower",
                )
            return super().grown(model, sizes)
        if self.keep_first or self.keep_last:
            raise GrowthError(
                "grow.sources lists every layer, so keep_first and keep_last have no meaning",
                fix="leave grow.keep_first and grow.keep_last out, or grow.sources",
            )
        return super().grown(model, sizes)

    def copied(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[str, bool]:
        """(source, whether it is a copy): a layer is old where its source is first used."""
        return of_first_use(tensor, self.sources or self._order(small.layers, target.layers))

    def _order(self, old: int, large: int) -> tuple[int, ...]:
        """The layers at the ends once, the middle stacked between them."""
        first, last = self.keep_first, self.keep_last
        middle = range(first, old - last)
        stacked = [middle[i % len(middle)] for i in range(large - first - last)]
        return (*range(first), *stacked, *range(old - last, old))


DEPTH_SLICES = DepthSlices(
    name="depth_slices",
    summary="copies of chosen layers: by a list, or all but the first and last ones stacked",
    keeps="nothing",
    breaker="copies sit at different depths, so their gradients differ; noise, where set",
    source="SOLAR, Kim et al., arXiv 2312.15166",
    policies=("copy", "kept", "sparkling", "reset"),
    sizes=("layers",),
    any_size=True,
    settings=("noise", "sources", "keep_first", "keep_last"),
)
