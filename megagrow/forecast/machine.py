"""The predicted cost of a training step and of a growth on a machine: seconds, MFU, bytes.

The model is a sum of terms (no overlap is assumed, so times are conservative):

    compute    model FLOPs (times 4/3 with full recomputation) / (ranks * peak * efficiency), at the
               pace of the slowest pipeline stage
    bubble     (p - 1) / m of that: 1F1B with m micro-batches, Narayanan et al. (arXiv 2104.04473)
    tensor     4 all-reduces of the stream for each block and micro-batch (2 forward, 2 backward),
               a ring's 2 (t - 1) / t of the bytes each (Shoeybi et al., arXiv 1909.08053); sequence
               parallelism and recomputation add to that, see `stream_reductions`
    pipeline   the stream, once forward and once backward, between neighbours, per micro-batch
    data       gradients reduced and parameters gathered: 2 (d - 1) / d of the parameters' bytes,
               3 with ZeRO 3 (Rajbhandari et al., arXiv 1910.02054)

Ranks are numbered with tensor parallelism fastest, then data, then pipeline, so a group is within a
node if the ranks it spans fit into one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from megagrow.config import Config, ModelConfig
from megagrow.config.batch import accumulation
from megagrow.config.section import Positive, Section
from megagrow.forecast.cost import Received
from megagrow.models.flops import forward_flops_by_place, train_flops_per_token
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.state.precision import PRECISIONS

Rate = Annotated[float, Field(gt=0)]


class MachineConfig(Section):
    """Nodes of equal devices.

    Attributes:
        nodes: number of nodes.
        gpus: devices per node.
        memory: bytes per device.
        flops: peak FLOP/s per device in the precision of the run.
        efficiency: the fraction of it that matrix products reach.
        memory_bandwidth: bytes/s of a device's memory, reads plus writes.
        intra, inter: bytes/s between two devices within a node, and across nodes, each way.
        disk: bytes/s that a node writes to storage.
    """

    nodes: Positive = 1
    gpus: Positive = 8
    memory: Rate = 80e9
    flops: Rate = 989e12
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.6
    memory_bandwidth: Rate = 3.35e12
    intra: Rate = 450e9
    inter: Rate = 50e9
    disk: Rate = 2e9

    @property
    def world(self) -> int:
        """Total number of devices."""
        return self.nodes * self.gpus

    def bandwidth(self, span: int) -> float:
        """Bytes/s within a group that spans this many consecutive ranks."""
        return self.intra if span <= self.gpus else self.inter


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by component, and its MFU."""

    compute: float
    bubble: float
    tensor: float
    pipeline: float
    data: float
    mfu: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.bubble + self.tensor + self.pipeline + self.data


def step_time(
    config: Config,
    model: ModelConfig,
    placement: Placement,
    machine: MachineConfig,
    *,
    held: int,
    sequence_parallel: bool = False,
) -> StepTime:
    """Predict a step.

    Args:
        config: the run; batch and precision are used.
        model: of the growth stage.
        placement: of the growth stage.
        machine: as many devices as the layout has ranks.
        held: parameters of the fullest rank before ZeRO partitions them.
        sequence_parallel: whether the stream is split along the sequence between blocks.
    """
    layout, width = placement.layout, PRECISIONS[config.precision.dtype].bytes
    micro_batches = accumulation(config.batch, layout)
    tokens = config.batch.global_ * model.sequence
    flops = train_flops_per_token(model, placement.catalog) * tokens
    by_place = forward_flops_by_place(model)
    stages = [sum(by_place[a:b]) for a, b in pairwise(placement.cuts)]
    uneven = max(stages) * len(stages) / sum(stages)
    again = 4 / 3 if model.activation_checkpointing == "full" else 1.0
    ideal = flops / (layout.world * machine.flops)
    compute = ideal * again * uneven / machine.efficiency
    stream = config.batch.micro * model.sequence * model.hidden * width
    # The first entry of the layer list is the embedding and the last one the head.
    blocks = max(min(b, model.layers + 1) - max(a, 1) for a, b in pairwise(placement.cuts))
    reductions = stream_reductions(model, sequence_parallel=sequence_parallel)
    tensor = _ring(layout.tensor) * reductions * 2 * stream * blocks * micro_batches
    pipeline = 2 * stream * micro_batches if layout.pipeline > 1 else 0
    passes = 3 if layout.zero == 3 else 2
    data = _ring(layout.data) * passes * held * width
    result = StepTime(
        compute=compute,
        bubble=compute * (layout.pipeline - 1) / micro_batches,
        tensor=tensor / machine.bandwidth(layout.tensor),
        pipeline=pipeline / machine.bandwidth(layout.world),
        data=data / machine.bandwidth(layout.tensor * layout.data),
        mfu=0.0,
    )
    return StepTime(**{**vars(result), "mfu": ideal / result.total})


def stream_reductions(model: ModelConfig, *, sequence_parallel: bool) -> float:
    """All-reduces of the stream per block and micro-batch, forward and backward.

    With sequence parallelism each is a reduce-scatter and an all-gather, which count half each, and
    the backward pass gathers the inputs of two weights again (Korthikanti et al., arXiv
    2205.05198). Full recomputation runs the forward pass a second time, up to the last tensor that
    the backward pass needs: without dropout that is before the block's last reduction.
    """
    halves = 10 if sequence_parallel else 8
    if model.activation_checkpointing == "full":
        halves += 4
        if not model.dropout:
            halves -= 1 if sequence_parallel else 2
    return halves / 2


def _ring(size: int) -> float:
    return (size - 1) / size


@dataclass(frozen=True)
class GrowthTime:
    """The cost of a live growth on the rank that receives most.

    Attributes:
        rank: that rank.
        local: bytes copied from its own state.
        intra, inter: bytes received from its node and from other nodes.
        seconds: total; building the new engines is not included.
        files_seconds: growing through a checkpoint instead: every node's state written and read.
    """

    rank: int
    local: int
    intra: int
    inter: int
    seconds: float
    files_seconds: float


def growth_time(
    counts: Mapping[int, Received], machine: MachineConfig, *, old_bytes: int, new_bytes: int
) -> GrowthTime:
    """The slowest of some ranks.

    Args:
        counts: where each rank's new state comes from.
        machine: the machine.
        old_bytes, new_bytes: size of the whole state before and after, on storage.
    """
    disk = machine.disk * machine.nodes
    files = old_bytes / disk + new_bytes / disk
    found = []
    for rank, count in counts.items():
        node = rank // machine.gpus
        near = sum(n for holder, n in count.by_holder.items() if holder // machine.gpus == node)
        far = count.crossed - near
        # Copied bytes are read once and written once.
        copied = 2 * (count.local + count.foreign) / machine.memory_bandwidth
        seconds = copied + near / machine.intra + far / machine.inter
        found.append(GrowthTime(rank, count.local, near, far, seconds, files))
    return max(found, key=lambda one: one.seconds)


def layouts_to_try(model: ModelConfig, machine: MachineConfig) -> list[Layout]:
    """Sensible layouts on a machine: tensor parallelism within a node, ZeRO 1, 2 or 3."""
    found = []
    for tensor in _powers(min(machine.gpus, model.kv_groups)):
        for pipeline in _powers(model.layers + 2):
            data, rest = divmod(machine.world, tensor * pipeline)
            if rest == 0 and data > 0:
                zeros = (1, 2, 3) if pipeline == 1 and tensor == 1 else (1,)
                found += [Layout(data, tensor, pipeline, zero) for zero in zeros]
    return found


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
