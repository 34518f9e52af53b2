"""Where DeepSpeed keeps a parameter's master copy: the one place that reaches into its insides.

Every DeepSpeed optimizer holds the fp32 master of a parameter, or this rank's flat range of it,
inside some tensor that the wrapped torch optimizer steps; the moments lie beside it under that
tensor's key.  `find_fragments` names the tensor and the range, `publish` copies masters
back into the parameters that the model computes with.

DeepSpeed 0.19.8; its classes and what they keep:
  (none)                          fp32, ZeRO 0: the parameter is its own master
  FP16_UnfusedOptimizer           16 bit, ZeRO 0: a master for each parameter
  DeepSpeedZeroOptimizer          ZeRO 1 and 2: one flat partition for each parameter group
  BF16_Optimizer                  bf16, ZeRO 1: likewise
  DeepSpeedZeroOptimizer_Stage3   ZeRO 3: a flat range of each parameter, laid end to end
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one local parameter.

    Attributes:
        start: first flat position in the local parameter.
        owner: the tensor that the torch optimizer steps and that holds the part.
        offset: the part's position there.
        length: number of elements, padding included.
    """

    start: int
    owner: torch.Tensor
    offset: int
    length: int


def find_fragments(engine: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Fragment]:
    """This rank's part of every parameter; one that it has no part of is left out.

    Args:
        engine: a DeepSpeedEngine.
        parameters: its module's parameters by logical name.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return {name: _stage3_fragment(optimizer, p) for name, p in parameters.items()}
    if isinstance(optimizer, BF16_Optimizer):
        return _mapped_fragments(parameters, optimizer.fp32_groups_flat_partition)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _mapped_fragments(parameters, optimizer.single_partition_of_fp32_groups)
    masters: dict[int, torch.Tensor] = {id(p): p for p in parameters.values()}
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        masters = {id(low): high for low, high in _unfused_pairs(optimizer)}
    return {name: Fragment(0, masters[id(p)], 0, p.numel()) for name, p in parameters.items()}


def link_optimizer_state(engine: Any) -> None:
    """Tell DeepSpeed that optimizer state exists, as it learns after its own first step."""
    if isinstance(engine.optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def publish(engine: Any) -> None:
    """Bring the parameters that the model computes with up to date with their masters."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered between steps, so their gathered copies are stale now.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        # Each rank writes its range of the model's parameters, and all gather the rest.
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in _unfused_pairs(optimizer):
            low.data.copy_(high.data)


def _mapped_fragments(
    parameters: Mapping[str, nn.Parameter], partitions: list[torch.Tensor]
) -> dict[str, Fragment]:
    fragments = {}
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            owner = partitions[mapping.param_group_index]
            fragments[name] = Fragment(low.start, owner, high.start, low.numel)
    return fragments


def _stage3_fragment(optimizer: Any, parameter: Any) -> Fragment:
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    rank = parameter.ds_tensor.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
    return Fragment(rank, optimizer.fp32_partitioned_groups_flat[group], offset, length)


def _unfused_pairs(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (low, high)
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for low, high in zip(lows, highs, strict=True)
    ]
