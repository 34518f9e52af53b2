"""Copy the master weights into the model's parameters, in messages of bounded size."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from megagrow.engine.deepspeed.privates import (
    Partitions,
    partitions,
    publish_stage3,
    unfused_masters,
)

_PUBLISH_BYTES = 16 * 2**20  # per message; bounds the staging buffers of NCCL and gloo


def publish(engine: Any) -> None:
    """Copy the master weights into the model's parameters."""
    publish_stage3(engine)
    for one in partitions(engine):
        _publish_partitions(one)
    for low, high in unfused_masters(engine):
        low.data.copy_(high.data)


def _publish_partitions(one: Partitions) -> None:
    """Each rank writes its range of the model's parameters and sends it to all others.

    Messages are received straight into the parameters, with no extra copy.
    """
    parts, group = one.parts, one.group
    mine, size = dist.get_rank(group), dist.get_world_size(group)
    parts[mine].data.copy_(one.master.data)
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
