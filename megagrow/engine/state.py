"""DeepSpeed's training state as source and sink: the one place that reaches into its insides.

A rank's part of a parameter and of its optimizer state is a flat range of the
local parameter, held in one flat tensor; `LiveState` finds those ranges and
hands out views, so a transfer reads and writes DeepSpeed's memory in place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megagrow.engine.optimizer import BlockAdamW, YoungShard
from megagrow.growth.rules import OptimizerRules
from megagrow.state.boxes import Box
from megagrow.state.catalog import ADAM_SLOTS, MASTER
from megagrow.state.placement import Placement, Shard


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one local parameter.

    Attributes:
        start: first flat position in the local parameter.
        owner: the optimizer's (flat) parameter that holds it.
        offset: its position there.
        length: number of elements.
    """

    start: int
    owner: torch.Tensor
    offset: int
    length: int


class LiveState:
    """The optimizer's view of the state of one rank, readable and writable box by box.

    Holds references to the tensors, so it stays readable after its engine is gone.
    """

    def __init__(
        self,
        placement: Placement,
        rank: int,
        memory: Mapping[tuple[str, str], tuple[int, torch.Tensor]],
    ) -> None:
        self.placement = placement
        self._memory = dict(memory)
        self._shards: dict[str, list[Shard]] = {}
        for shard in placement.shards(rank):
            self._shards.setdefault(shard.tensor, []).append(shard)

    def view(self, tensor: str, slot: str, box: Box) -> torch.Tensor:
        """The memory of a box that lies inside one of the rank's shards.

        Raises:
            KeyError: this rank holds no such box.
        """
        shard = self._shard_around(tensor, box)
        start, flat = self._memory[tensor, slot]
        first = shard.start - start
        whole = flat[first : first + shard.box.volume].view(shard.box.shape)
        return whole[box.relative_to(shard.box.offset).slices]

    def read(self, tensor: str, slot: str, box: Box) -> torch.Tensor:
        """The values of a box, as a view."""
        return self.view(tensor, slot, box)

    def _shard_around(self, tensor: str, box: Box) -> Shard:
        shards = self._shards.get(tensor, [])
        # Shards of a flat range lie in row-major order, so the last that begins no later is it.
        at = bisect_right([shard.box.offset for shard in shards], box.offset) - 1
        if at < 0 or not shards[at].box.contains(box):
            raise KeyError(f"box {box} of {tensor} is not on this rank")
        return shards[at]


def live_state(
    *,
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    placement: Placement,
    rank: int,
    rules: OptimizerRules,
    optimizer_step: int,
) -> LiveState:
    """Make the optimizer state of a fresh engine and open all of its state for a transfer.

    Args:
        engine: a DeepSpeedEngine that has not stepped yet.
        parameters: the module's parameters by logical name.
        placement: the arithmetic that says who holds what; checked against the engine.
        rank: this rank.
        rules: young blocks, handed on to the optimizer.
        optimizer_step: the step count that the optimizer goes on from.

    Raises:
        RuntimeError: the engine holds other ranges than the placement says (a new
            DeepSpeed that partitions in another way).
    """
    optimizer: BlockAdamW = engine.basic_optimizer
    optimizer.make_state(step=optimizer_step)
    if placement.layout.zero in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    at = placement.layout.coordinates(rank)
    memory: dict[tuple[str, str], tuple[int, torch.Tensor]] = {}
    young: dict[torch.Tensor, list[YoungShard]] = {}
    for name, parameter in parameters.items():
        fragment = _fragment(engine, parameter, placement.layout.zero)
        expected = placement.flat_range(placement.catalog[name], at)
        found = (0, 0) if fragment is None else (fragment.start, fragment.start + fragment.length)
        if found != expected and (expected[0] < expected[1] or fragment is not None):
            raise RuntimeError(
                f"DeepSpeed holds elements {found} of {name} on rank {rank}, not {expected}: "
                "its partitioning is not the one that megagrow/state/placement.py describes"
            )
        if fragment is None:
            continue
        for slot in ADAM_SLOTS:
            flat = fragment.owner if slot == MASTER else optimizer.state[fragment.owner][slot.name]
            piece = flat.detach().view(-1)[fragment.offset : fragment.offset + fragment.length]
            memory[name, slot.name] = (fragment.start, piece)
        if name in rules.young:
            young.setdefault(fragment.owner, []).extend(
                YoungShard(
                    start=shard.start - fragment.start + fragment.offset,
                    box=shard.box,
                    blocks=rules.young[name],
                )
                for shard in placement.shards_of(name, rank)
            )
    optimizer.set_young(young)
    return LiveState(placement, rank, memory)


def publish(engine: Any, zero: int) -> None:
    """Bring the model's own parameters up to date with the state that was just written."""
    if zero in (1, 2):
        # Each rank writes its range of the low-precision copy, and all gather the rest.
        engine.optimizer.update_lp_params()


def _fragment(engine: Any, parameter: nn.Parameter, zero: int) -> Fragment | None:
    if zero == 0:
        return Fragment(0, parameter, 0, parameter.numel())
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    owner = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Fragment(low.start, owner, high.start, low.numel)
