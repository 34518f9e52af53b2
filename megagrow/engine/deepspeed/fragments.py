"""Where DeepSpeed keeps each parameter's master weights: reads its private attributes.

Every DeepSpeed optimizer holds the fp32 master of a parameter, or this rank's flat range of it,
inside a tensor that the wrapped torch optimizer steps; the moments are stored under that
tensor's key.  `find_fragments` locates the tensor and the range, `publish` copies the masters
back into the model's parameters.

DeepSpeed 0.19.8; its optimizer classes and what each keeps:
  (none)                          fp32, ZeRO 0: the parameter is its own master
  FP16_UnfusedOptimizer           16 bit, ZeRO 0: one master per parameter
  DeepSpeedZeroOptimizer          ZeRO 1 and 2: one flat partition per parameter group
  BF16_Optimizer                  bf16, ZeRO 1: the same
  DeepSpeedZeroOptimizer_Stage3   ZeRO 3: a flat range of each parameter, concatenated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

_PUBLISH_BYTES = 16 * 2**20  # per message; bounds the staging buffers of NCCL and gloo


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one local parameter.

    Attributes:
        start: first flat position in the local parameter.
        owner: the tensor that holds this part and that the torch optimizer steps.
        offset: the part's position in `owner`.
        length: number of elements, padding included.
    """

    start: int
    owner: torch.Tensor
    offset: int
    length: int


def find_fragments(engine: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Fragment]:
    """This rank's part of every parameter; parameters of which it holds nothing are omitted.

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
    """Tell DeepSpeed that optimizer state exists, as its own first step would."""
    if isinstance(engine.optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def publish(engine: Any) -> None:
    """Copy the master weights into the model's parameters."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered between steps, so their gathered copies are stale now.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
    elif isinstance(optimizer, BF16_Optimizer):
        _publish_partitions(
            optimizer.fp32_groups_flat_partition,
            optimizer.bf16_partitioned_groups,
            optimizer.real_dp_process_group,
        )
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        _publish_partitions(
            optimizer.single_partition_of_fp32_groups,
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.real_dp_process_group,
        )
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in _unfused_pairs(optimizer):
            low.data.copy_(high.data)


def _publish_partitions(
    masters: Sequence[torch.Tensor],
    partitions: Sequence[Sequence[torch.Tensor]],
    groups: Sequence[dist.ProcessGroup],
) -> None:
    """Each rank writes its range of the model's parameters and sends it to all others.

    DeepSpeed's `update_lp_params` gathers a whole group in one collective, for which gloo
    needs a second copy of all parameters.  Here messages of bounded size are received straight
    into the parameters, with no extra copy.

    Args:
        masters: by parameter group, this rank's fp32 partition.
        partitions: by parameter group, the partitions of all data ranks, contiguous in the
            memory of the model's parameters.
        groups: by parameter group, the data ranks.
    """
    for master, parts, group in zip(masters, partitions, groups, strict=True):
        mine, size = dist.get_rank(group), dist.get_world_size(group)
        parts[mine].data.copy_(master.data)
        step = max(1, _PUBLISH_BYTES // parts[mine].element_size())
        # As in a transfer, ranks are paired by distance, so no rank waits in a ring.
        for distance in range(1, size):
            to, source = (mine + distance) % size, (mine - distance) % size
            _exchange(parts[mine].data, to, parts[source].data, source, group=group, step=step)


def _exchange(
    send: torch.Tensor,
    to: int,
    receive: torch.Tensor,
    source: int,
    *,
    group: dist.ProcessGroup,
    step: int,
) -> None:
    """Send a flat tensor and receive another, `step` elements at a time, within the group."""
    to, source = dist.get_global_rank(group, to), dist.get_global_rank(group, source)
    pieces = zip_longest(send.split(step), receive.split(step))
    for out, room in pieces:
        operations = []
        if out is not None:
            operations.append(dist.P2POp(dist.isend, out, to, group))
        if room is not None:
            operations.append(dist.P2POp(dist.irecv, room, source, group))
        for work in dist.batch_isend_irecv(operations):
            work.wait()


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
    rank = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
    return Fragment(rank, optimizer.fp32_partitioned_groups_flat[group], offset, length)


def _unfused_pairs(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (low, high)
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for low, high in zip(lows, highs, strict=True)
    ]
