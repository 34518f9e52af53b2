"""The process grid: tensor x pipeline x data parallel sizes and the ZeRO stage.

Arithmetic only.  Ranks are numbered as DeepSpeed's pipeline topology numbers
them, the tensor-parallel axis fastest: rank = (pipe * data + d) * tensor + t,
so that tensor-parallel groups stay within a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.errors import ConfigError

# Axes that tensor parallelism splits, as in Megatron: column-parallel weights on their
# output units, row-parallel weights on their input units, embeddings on the vocabulary.
SPLIT_AXES = frozenset({"vocab", "kv_group", "ffn"})


@dataclass(frozen=True)
class Coordinates:
    """A rank's coordinates in the grid."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the process grid and the ZeRO stage."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 0

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.data * self.tensor * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a rank."""
        outer, tensor = divmod(rank, self.tensor)
        pipe, data = divmod(outer, self.data)
        return Coordinates(pipe=pipe, data=data, tensor=tensor)

    def rank(self, *, pipe: int, data: int, tensor: int) -> int:
        """Inverse of `coordinates`."""
        return (pipe * self.data + data) * self.tensor + tensor

    def __str__(self) -> str:
        return (
            f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}, ZeRO {self.zero}"
        )


def make_layout(*, world: int, tensor: int, pipeline: int, zero: int, key: str) -> Layout:
    """The layout of `world` ranks; the data-parallel size is world / (tensor * pipeline).

    Args:
        key: the configuration key to name in errors, e.g. ``stages[1].layout``.

    Raises:
        ConfigError: tensor * pipeline does not divide the number of processes.
    """
    data, rest = divmod(world, tensor * pipeline)
    if rest or data == 0:
        raise ConfigError(
            f"{key}: {world} processes cannot be arranged as tensor {tensor} x pipeline {pipeline}",
            found=f"tensor * pipeline = {tensor * pipeline}, processes = {world}",
            expected="a number of processes that tensor * pipeline divides",
            fix=f"start {tensor * pipeline} processes or a multiple, or change {key}",
        )
    return Layout(data=data, tensor=tensor, pipeline=pipeline, zero=zero)


def even_split(length: int, parts: int, index: int) -> tuple[int, int]:
    """Part `index` of `length` items cut into equal parts: (start, stop), clipped to `length`.

    Parts have ceil(length / parts) items; the last ones are padded.
    """
    size = -(-length // parts)
    return min(index * size, length), min((index + 1) * size, length)


def balanced_cuts(weights: Sequence[int], parts: int) -> tuple[int, ...]:
    """Cut a list into `parts` contiguous runs, minimising the largest total weight.

    Returns parts + 1 positions, the first 0 and the last len(weights).  Every run has
    at least one item.  Binary search over the largest weight; O(n log sum).

    Raises:
        ValueError: fewer items than parts.
    """
    if len(weights) < parts:
        raise ValueError(f"{len(weights)} items cannot fill {parts} parts")

    def cuts_within(bound: int) -> tuple[int, ...] | None:
        cuts, load = [0], 0
        for i, weight in enumerate(weights):
            must_leave = len(weights) - i <= parts - len(cuts)
            if i > cuts[-1] and (load + weight > bound or must_leave):
                cuts.append(i)
                load = 0
            load += weight
            if weight > bound or len(cuts) > parts:
                return None
        return (*cuts, len(weights)) if len(cuts) == parts else None

    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if cuts_within(middle) is None:
            low = middle + 1
        else:
            high = middle
    best = cuts_within(low)
    assert best is not None
    return best
