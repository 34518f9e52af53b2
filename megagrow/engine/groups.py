"""Process groups of a layout, and DeepSpeed's view of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist

from megagrow.models.common.parallel import TensorParallel
from megagrow.state.layout import Layout


@dataclass(frozen=True)
class Groups:
    """This rank's process groups in one layout; None for a group of one rank.

    Attributes:
        layout: the process grid.
        rank: this rank.
        tensor: tensor-parallel ranks: same pipeline stage, same data.
        data: data-parallel ranks: same parameters, different data; never None.
        model: ranks that together hold one copy of the model: all stages, all tensor ranks.
        ends: the ranks on the first and the last pipeline stage that hold the same vocabulary
            rows; None on the stages between.
    """

    layout: Layout
    rank: int
    tensor: dist.ProcessGroup | None
    data: dist.ProcessGroup | None
    model: dist.ProcessGroup | None
    ends: dist.ProcessGroup | None

    def add_shards(self, values: torch.Tensor, *, zero: int) -> None:
        """Sum in place over the ranks that shard the state of one pipeline stage.

        The same groups serve every ZeRO stage of a layout, so the caller passes `zero`.
        """
        if zero > 0 and self.layout.data > 1:
            dist.all_reduce(values, group=self.data)
        if self.tensor is not None:
            dist.all_reduce(values, group=self.tensor)

    def tensor_parallel(self, *, sequence: bool) -> TensorParallel:
        """The tensor-parallel group in the form the model's layers expect."""
        at = self.layout.coordinates(self.rank)
        return TensorParallel(self.tensor, at.tensor, self.layout.tensor, sequence)


def make_groups(layout: Layout, rank: int) -> Groups:
    """Create the groups of a layout; collective: all ranks call it in the same order."""
    pipes, datas, tensors = range(layout.pipeline), range(layout.data), range(layout.tensor)

    def ranks(p: Iterable[int], d: Iterable[int], t: Iterable[int]) -> list[int]:
        return [layout.rank(pipe=x, data=y, tensor=z) for x, y, z in product(p, d, t)]

    last = (0, layout.pipeline - 1) if layout.pipeline > 1 else (0,)
    return Groups(
        layout=layout,
        rank=rank,
        tensor=_mine(rank, [ranks([p], [d], tensors) for p in pipes for d in datas]),
        data=_mine(rank, [ranks([p], datas, [t]) for p in pipes for t in tensors], alone=True),
        model=_mine(rank, [ranks(pipes, [d], tensors) for d in datas]),
        ends=_mine(rank, [ranks(last, [d], [t]) for d in datas for t in tensors]),
    )


def _mine(rank: int, members: list[list[int]], *, alone: bool = False) -> dist.ProcessGroup | None:
    """Create all groups of one kind and return the one that this rank is in."""
    mine = None
    if len(members[0]) == 1 and not alone:
        return None
    for ranks in members:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine


class ModelParallelUnit:
    """The `mpu` object that DeepSpeed queries for tensor- and data-parallel groups."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._at = groups.layout.coordinates(groups.rank)

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's index in its tensor-parallel group."""
        return self._at.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self._groups.layout.tensor

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group."""
        return self._groups.tensor

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """This rank's index in its data-parallel group."""
        return self._at.data

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return self._groups.layout.data

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The data-parallel group; never None, even for a single rank."""
        return self._groups.data
