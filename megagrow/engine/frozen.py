"""The parameters that a growth stage does not train: their masters, and how they are published.

DeepSpeed's optimizer does not have them (`requires_grad` is False, and they are in no parameter
group), so it keeps no gradient, moments or master of them. Their masters are in the memory of the
model's own parameters where that is fp32. In 16 bit each rank keeps its range of them in fp32, or
a stage that freezes a tensor would round it.

They are placed like trained ones: cut into ranges over the data ranks by the ZeRO stage
(`megagrow.state.placement`), so that saves and transfers share the work.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from megagrow.engine.deepspeed.privates import Fragment, own_partition
from megagrow.engine.groups import Groups
from megagrow.state.layout import Coordinates
from megagrow.state.placement import Placement


class FrozenParameters:
    """The frozen parameters of one rank.

    Args:
        parameters: by logical name, already in DeepSpeed's hands.
        placement: who holds what.
        groups: the process groups.
        device: where masters that are not in the model are kept.

    Attributes:
        fragments: where this rank's part of each parameter is; those of which it has none are
            omitted.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        placement: Placement,
        groups: Groups,
        *,
        device: torch.device,
    ) -> None:
        self._parameters, self._placement, self._groups = dict(parameters), placement, groups
        self._at = placement.layout.coordinates(groups.rank)
        self.fragments: dict[str, Fragment] = {}
        for name, parameter in self._parameters.items():
            start, memory = self._memory(name, parameter)
            if memory.numel() == 0:
                continue
            master = memory
            if memory.dtype != torch.float32:
                master = torch.full_like(memory, torch.nan, dtype=torch.float32, device=device)
            self.fragments[name] = Fragment(start, master, 0, master.numel())

    def _memory(self, name: str, parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
        """This rank's flat range in the model's memory: its start, and its elements."""
        part = own_partition(parameter)
        if part is not None:
            return part
        start, stop = self._range(name, self._at)
        return start, parameter.data.view(-1)[start:stop]

    def _range(self, name: str, at: Coordinates) -> tuple[int, int]:
        return self._placement.flat_range(self._placement.catalog[name], at)

    def publish(self) -> None:
        """Copy the masters into the model's parameters, and exchange ranges with the data ranks.

        To be called before `deepspeed.publish.publish`, which gathers what ZeRO 3 keeps gathered.
        """
        for name, fragment in self.fragments.items():
            _, memory = self._memory(name, self._parameters[name])
            if memory.data_ptr() != fragment.owner.data_ptr():
                memory.copy_(fragment.owner)
        layout = self._placement.layout
        if not self._parameters or layout.data == 1 or layout.zero not in (1, 2):
            return
        # NCCL starts a group's communicator with all of its ranks, and below only some may send.
        first = next(iter(self._parameters.values()))
        dist.all_reduce(torch.zeros(1, device=first.device), group=self._groups.data)
        for distance in range(1, layout.data):
            for name, parameter in self._parameters.items():
                self._exchange(name, parameter, distance)

    def _exchange(self, name: str, parameter: nn.Parameter, distance: int) -> None:
        """Send this rank's range to one data rank, and receive another's."""
        data, group = self._placement.layout.data, self._groups.data
        assert group is not None
        flat, operations = parameter.data.view(-1), []
        to, source = (self._at.data + distance) % data, (self._at.data - distance) % data
        for operation, whose, other in (
            (dist.isend, self._at.data, to),
            (dist.irecv, source, source),
        ):
            at = Coordinates(pipe=self._at.pipe, data=whose, tensor=self._at.tensor)
            start, stop = self._range(name, at)
            if start < stop:
                peer = dist.get_global_rank(group, other)
                operations.append(dist.P2POp(operation, flat[start:stop], peer, group))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
