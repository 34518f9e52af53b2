"""Masks of a model during a ramp, which gradually admits new units.

The plain layers are not aware of it. A model under a ramp has other classes in a few places
(embedding, norms, the two projections that write to the stream), with the same parameters under the
same names: a unit's output is multiplied by its mask, 1 for old units and the ramp's progress for
new ones, and a norm's statistics are weighted by it. At 0 that is the small model, at 1 the plain
large one.

Shapes: B batch, S sequence, s a rank's part of it, E embed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megagrow.config import ModelConfig
from megagrow.models.common.blocks import MLP, Attention, Embedding
from megagrow.models.common.documents import Documents
from megagrow.models.common.layers import (
    AddLayerNorm,
    AddRMSNorm,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    replicated,
)
from megagrow.models.common.parallel import SERIAL, TensorParallel


class Masks:
    """The masks of this rank's units, one per kind, updated in place by `set`.

    Args:
        model: the grown model.
        old: the number of old units by axis.
        parallel: the ranks that hold the other heads and ffn units.
        like: a parameter; masks have its device and dtype.

    Attributes:
        embed: [E].
        heads: [width], the inputs of attention's output projection.
        ffn: [width], the inputs of the MLP's.
    """

    def __init__(
        self,
        model: ModelConfig,
        old: Mapping[str, int],
        *,
        parallel: TensorParallel,
        like: torch.Tensor,
    ) -> None:
        groups, queries = model.kv_groups, model.heads // model.kv_groups
        group = _part(torch.arange(groups) < old["kv_group"], parallel)
        query = torch.arange(queries) >= queries - old["query"]
        heads = (group[:, None] & query).flatten().repeat_interleave(model.head_dim)
        ffn = _part(torch.arange(model.ffn) < old["ffn"], parallel)
        embed = torch.arange(model.hidden) < old["embed"]
        self._old = [axis.to(like.device) for axis in (embed, heads, ffn)]
        self.embed, self.heads, self.ffn = (
            torch.ones(axis.shape, dtype=like.dtype, device=like.device) for axis in self._old
        )

    def set(self, progress: float) -> None:
        """Set the weight of new units, from 0 to 1."""
        for mask, old in zip((self.embed, self.heads, self.ffn), self._old, strict=True):
            mask.fill_(progress)[old] = 1.0


def ramp_in(
    module: nn.Module,
    model: ModelConfig,
    old: Mapping[str, int],
    *,
    parallel: TensorParallel = SERIAL,
) -> Masks:
    """Install masks in a model or a pipeline stage.

    Its dtype must not change afterwards. To remove the masks, rebuild the model.

    Args:
        module: the grown model, built without masks.
        model, old, parallel: see `Masks`.

    Raises:
        TypeError: a family has its own norms or embedding, which would not be masked.
    """
    masks = Masks(model, old, parallel=parallel, like=next(module.parameters()))
    for part in list(module.modules()):
        if type(part) in _RAMPED:
            _become(part, _RAMPED[type(part)], masks=masks)
        elif isinstance(part, tuple(_RAMPED)):
            raise TypeError(
                f"a ramp has no mask for {type(part).__name__}, only for what it derives from: "
                "see models/common/masks.py"
            )
        elif isinstance(part, Attention):
            _become(part.out, _RampedProjection, masks=masks, inputs=masks.heads)
        elif isinstance(part, MLP):
            _become(part.down, _RampedProjection, masks=masks, inputs=masks.ffn)
    return masks


def _become(part: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    part.__class__ = kind
    part.__dict__.update(attributes)


class _RampedEmbedding(Embedding):
    masks: Masks

    def forward(self, tokens: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        return super().forward(tokens, documents) * self.masks.embed


class _RampedProjection(RowParallelLinear):
    masks: Masks
    inputs: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.inputs) * self.masks.embed


class _RampedLayerNorm(LayerNorm):
    masks: Masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, s, E]; same shape."""
        wide, mask = _widened(x), _widened(self.masks.embed)
        share = mask / mask.sum()
        wide = wide - (wide * share).sum(-1, keepdim=True)
        wide = wide * torch.rsqrt((wide.square() * share).sum(-1, keepdim=True) + self.eps)
        weight, bias = (replicated(p, self._parallel) for p in (self.weight, self.bias))
        return (wide.to(x.dtype) * weight + bias) * self.masks.embed


class _RampedRMSNorm(RMSNorm):
    masks: Masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, s, E]; same shape."""
        wide, mask = _widened(x), _widened(self.masks.embed)
        mean = (wide.square() * (mask / mask.sum())).sum(-1, keepdim=True)
        wide = wide * torch.rsqrt(mean + self.eps)
        return wide.to(x.dtype) * self._gain_here() * self.masks.embed


class _RampedAddLayerNorm(_RampedLayerNorm):
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = residual + x
        return super().forward(z), z


class _RampedAddRMSNorm(_RampedRMSNorm):
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = residual + x
        return super().forward(z), z


_RAMPED: dict[type[nn.Module], type[nn.Module]] = {
    AddLayerNorm: _RampedAddLayerNorm,
    AddRMSNorm: _RampedAddRMSNorm,
    Embedding: _RampedEmbedding,
    LayerNorm: _RampedLayerNorm,
    RMSNorm: _RampedRMSNorm,
}


def _widened(x: torch.Tensor) -> torch.Tensor:
    """Statistics of lower precisions are computed in fp32, as in plain norms."""
    return x if x.dtype == torch.float64 else x.float()


def _part(units: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """This rank's part of an axis that tensor parallelism splits."""
    return units.chunk(parallel.size)[parallel.rank]
