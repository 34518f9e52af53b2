"""DeepSpeed's training state as source and sink of a transfer.

A rank's part of a parameter and of its optimizer state is a flat range of the
local parameter, held in one flat tensor; `LiveState` finds those ranges and
returns views, so a transfer reads and writes DeepSpeed's memory in place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from megagrow.engine.deepspeed.privates import (
    Fragment,
    find_fragments,
    inner_optimizer,
    link_optimizer_state,
)
from megagrow.engine.optimizers.blockwise import BlockOptimizer, YoungShard
from megagrow.engine.optimizers.generations import bands
from megagrow.engine.optimizers.muon import SharedTensor
from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.state.boxes import Box
from megagrow.state.catalog import MASTER, Slot, slots_of
from megagrow.state.matrices import matrices
from megagrow.state.placement import Placement, Shard


class LiveState:
    """One rank's state as the optimizer sees it, readable and writable box by box.

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
        """The memory of a box that is inside one of the rank's shards.

        Raises:
            KeyError: this rank holds no such box.
        """
        shard = self._shard_around(tensor, box)
        start, flat = self._memory[tensor, slot]
        first = shard.start - start
        whole = flat[first : first + shard.box.volume].view(shard.box.shape)
        return whole[box.relative_to(shard.box.offset).slices]

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot (KeyError if this rank holds none of it)."""
        return self._memory[tensor, slot][1].dtype

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box, as a view or in `out`."""
        values = self.view(tensor, slot, box)
        return values if out is None else out.copy_(values)

    def _shard_around(self, tensor: str, box: Box) -> Shard:
        shards = self._shards.get(tensor, [])
        # Shards of a flat range are in row-major order, so this is the last one that starts by
        # `box`.
        at = bisect_right([shard.box.offset for shard in shards], box.offset) - 1
        if at < 0 or not shards[at].box.contains(box):
            raise KeyError(f"box {box} of {tensor} is not on this rank")
        return shards[at]


def fill_with_nan(parameters: Iterable[nn.Parameter], *, shared: bool) -> None:
    """Fill parameters with NaN, so that anything a transfer fails to write stops the run at once.

    Args:
        parameters: all of one dtype and device.
        shared: whether they may share one buffer, as large as the largest of them, because
            DeepSpeed will copy each into its own memory.
    """
    every = list(parameters)
    if not every:
        return
    if not shared:
        for parameter in every:
            parameter.data.fill_(torch.nan)
        return
    first = every[0]
    memory = first.data.new_full((max(p.numel() for p in every),), torch.nan)
    for parameter in every:
        parameter.data = memory[: parameter.numel()].view(parameter.shape)


def live_state(
    *,
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    frozen: Mapping[str, Fragment] = MappingProxyType({}),
    placement: Placement,
    rank: int,
    slots: Sequence[Slot],
    rules: OptimizerRules,
    optimizer_step: int,
) -> LiveState:
    """Allocate the optimizer state of a new engine and open all of its state for a transfer.

    Args:
        engine: a DeepSpeedEngine that has not stepped yet.
        parameters: the module's trained parameters by logical name.
        frozen: this rank's parts of the frozen ones.
        placement: the computed placement; checked against the engine.
        rank: this rank.
        slots: the parameter and its optimizer slots.
        rules: rules for new blocks, passed on to the optimizer.
        optimizer_step: the step count that the optimizer continues from.

    Raises:
        RuntimeError: the engine's ranges are not those of the placement (a new DeepSpeed
            version that partitions differently).
    """
    optimizer: BlockOptimizer = inner_optimizer(engine)
    fragments = find_fragments(engine, parameters)
    # Several parameters may share an owner; each owner's state is made once.
    owners = {id(f.owner): f.owner for f in fragments.values()}
    # Placeholder parameters (for groups that only other pipeline stages use) have no fragment.
    owners |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    kept: dict[int, tuple[str, ...]] = {
        # Parameters that share an owner are in one group, and so have the same slots.
        id(f.owner): tuple(s.name for s in slots_of(placement.catalog[name], slots[1:]))
        for name, f in fragments.items()
    }
    every = tuple(slot.name for slot in slots[1:])
    optimizer.make_state(
        owners.values(), step=optimizer_step, moments=lambda owner: kept.get(id(owner), every)
    )
    link_optimizer_state(engine)
    fragments |= frozen
    at = placement.layout.coordinates(rank)
    memory: dict[tuple[str, str], tuple[int, torch.Tensor]] = {}
    young: dict[torch.Tensor, list[YoungShard]] = {}
    for name in (*parameters, *frozen):
        expected = placement.flat_range(placement.catalog[name], at)
        fragment = fragments.get(name)
        _check_range(name, expected, fragment, rank)
        if fragment is None:
            continue
        for slot in slots_of(placement.catalog[name], slots):
            flat = fragment.owner if slot == MASTER else optimizer.state[fragment.owner][slot.name]
            piece = flat.detach().view(-1)[fragment.offset : fragment.offset + fragment.length]
            memory[name, slot.name] = (fragment.start, piece)
        if name in rules.young:
            for shard in placement.shards_of(name, rank):
                start = shard.start - fragment.start + fragment.offset
                for part, blocks in bands(rules.young[name], shard.box):
                    if blocks is not None:
                        young.setdefault(fragment.owner, []).append(
                            YoungShard(start=start, box=part, blocks=blocks)
                        )
                    start += part.volume
    optimizer.set_young(young)
    return LiveState(placement, rank, memory)


def shared_tensors(
    *,
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    placement: Placement,
    rank: int,
    rules: OptimizerRules,
) -> dict[torch.Tensor, list[SharedTensor]]:
    """The sharded tensors of a Muon parameter group, keyed by the tensor that the optimizer steps.

    In catalog order, on every rank of the pipeline stage, including tensors of which this rank
    holds no part.
    """
    fragments = find_fragments(engine, parameters)
    found: dict[torch.Tensor, list[SharedTensor]] = {}
    for group in inner_optimizer(engine).param_groups:
        for name in group["tensors"] if group["orthogonal"] else ():
            tensor, fragment = placement.catalog[name], fragments.get(name)
            owner = fragment.owner if fragment else group["params"][0]
            shards = [] if fragment is None else [
                (shard.box, shard.start - fragment.start + fragment.offset)
                for shard in placement.shards_of(name, rank)
            ]  # fmt: skip
            found.setdefault(owner, []).append(
                SharedTensor(tensor.shape, matrices(tensor), tuple(shards), rules.young.get(name))
            )
    return found


def held_shards(
    *,
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    placement: Placement,
    rank: int,
    names: Sequence[str],
) -> dict[torch.Tensor, list[tuple[str, Box, int]]]:
    """This rank's parts of some tensors, keyed by the tensor that the optimizer steps.

    Each part is (name, box in logical coordinates, flat position), contiguous there.
    """
    found: dict[torch.Tensor, list[tuple[str, Box, int]]] = {}
    here = {name: parameters[name] for name in names if name in parameters}
    for name, fragment in find_fragments(engine, here).items():
        for shard in placement.shards_of(name, rank):
            start = shard.start - fragment.start + fragment.offset
            found.setdefault(fragment.owner, []).append((name, shard.box, start))
    return found


def _check_range(
    name: str, expected: tuple[int, int], fragment: Fragment | None, rank: int
) -> None:
    """Check that the placement matches DeepSpeed's range, up to padding at the parameter's end."""
    start, stop = expected
    if fragment is None:
        holds = start == stop
    else:
        padded = fragment.start + fragment.length
        holds = start == stop or (fragment.start == start and padded >= stop)
    if not holds:
        raise RuntimeError(
            f"DeepSpeed holds {fragment} of {name} on rank {rank}, not elements {expected}: "
            "its partitioning is not the one that megagrow/state/placement.py describes"
        )
