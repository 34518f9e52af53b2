"""A checkpoint whose values go through a state map: what a growth makes of it, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.state.boxes import Box
from megagrow.state.catalog import Catalog
from megagrow.transfer.read_through import Through


class GrownCheckpoint:
    """The checkpoint that a growth makes of another, as a source: read box by box, never whole."""

    zeros: frozenset[tuple[str, str]] = frozenset()

    def __init__(
        self,
        source: CheckpointSource,
        values: Through,
        *,
        catalog: Catalog,
        config: Mapping[str, Any],
        run_state: Mapping[str, Any],
        fingerprints: Mapping[str, str],
    ) -> None:
        self._source, self._values = source, values
        self.path, self.step, self.left_out = source.path, source.step, source.left_out
        self.slots, self.layout = source.slots, source.layout
        self.fingerprints = fingerprints
        self.catalog, self.config, self.run_state = catalog, config, run_state

    @property
    def files(self) -> Mapping[str, int]:
        """Those of the checkpoint that is grown."""
        return self._source.files

    @property
    def bytes(self) -> int:
        """Size of those."""
        return self._source.bytes

    @property
    def checksums(self) -> int:
        """Number of checksums of those, which reads compare."""
        return self._source.checksums

    def holds(self, tensor: str, slot: str) -> bool:
        """Whether a tensor has the slot."""
        return self._values.holds(tensor, slot)

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        """The element type of a tensor's slot."""
        return self._values.dtype(tensor, slot)

    def sources(self, name: str, box: Box, *, reader: int) -> Iterator[tuple[int, Box]]:
        """One holder of everything."""
        yield 0, box

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The grown values of a box."""
        return self._values.read(tensor, slot, box, out=out)

    def verify(self) -> None:
        """Compare every checksum of the checkpoint that is grown."""
        self._source.verify()
