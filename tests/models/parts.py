"""Parts of whole tensors, as tensor-parallel ranks hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from megagrow.config import ModelConfig
from megagrow.models.catalog import build_catalog
from megagrow.models.common.parallel import TensorParallel
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement

if TYPE_CHECKING:
    from megagrow.engine.comm import Comm


def this_rank(comm: Comm, *, sequence: bool = False) -> TensorParallel:
    """All ranks of a job as one tensor-parallel group."""
    return TensorParallel(dist.group.WORLD, comm.rank, comm.world, sequence)


def local_part(
    model: ModelConfig, name: str, whole: torch.Tensor, parallel: TensorParallel
) -> torch.Tensor:
    """A rank's part of a whole tensor; padding is NaN, so that any use of it shows."""
    tensor = build_catalog(model)[name]
    placement = Placement(build_catalog(model), Layout(tensor=parallel.size))
    local = placement.local(tensor, parallel.rank)
    part = torch.full(local.shape, torch.nan, dtype=whole.dtype)
    valid = tuple(slice(0, n) for n in local.box.shape)
    part[valid] = whole[local.box.slices]
    return part


def random_parameters(model: ModelConfig, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Whole fp64 tensors by name, all with generic values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor.name: (tensor.init.kind == "ones")
        + 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for tensor in build_catalog(model)
    }


def module_with(
    model: ModelConfig,
    parameters: Mapping[str, torch.Tensor],
    parallel: TensorParallel | None = None,
) -> Transformer:
    """A model, or a rank's part of it, with given whole parameters."""
    parallel = parallel or TensorParallel()
    module = Transformer(model, parallel).double()
    with torch.no_grad():
        for name, parameter in named_tensors(module).items():
            parameter.copy_(local_part(model, name, parameters[name], parallel))
    return module


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Gradients by logical name."""
    return {name: parameter.grad for name, parameter in named_tensors(module).items()}
