"""The ends of a transfer: sources, targets, and the channel to other ranks."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from megagrow.state.boxes import Box

Operation = Literal["sum", "max"]


class Source(Protocol):
    """Something that boxes can be read from: live state, whole tensors, or a checkpoint."""

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot."""
        ...

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of a box, of its shape.

        They are written to `out` if it is given; otherwise the result may be a view, which must
        not be modified.
        """
        ...


class Target(Protocol):
    """Something whose boxes can be written in place."""

    def view(self, tensor: str, slot: str, box: Box) -> torch.Tensor:
        """The memory of a box, of its shape."""
        ...


class Channel(Protocol):
    """Messages between the ranks of a job."""

    rank: int
    world: int

    def exchange(
        self,
        *,
        send: torch.Tensor | None,
        to: int,
        receive: torch.Tensor | None,
        source: int,
    ) -> None:
        """Send one flat tensor and receive another; returns when both are done."""
        ...

    def reduce(self, values: torch.Tensor, *, operation: Operation) -> None:
        """All-reduce a tensor in place."""
        ...


class NoChannel:
    """The channel of a single-process job."""

    rank = 0
    world = 1

    def exchange(
        self, *, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> None:
        """Never called: a single process has no peer."""
        raise AssertionError("a single process has no peer to exchange with")

    def reduce(self, values: torch.Tensor, *, operation: Operation) -> None:
        """No-op: the reduction over one rank."""
