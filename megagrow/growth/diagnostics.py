"""What the diagnostics inspect after a growth: matrices, their new elements, and twin units.

A function of the growth alone, so that every rank knows it and a resumed run inspects the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.growth.new_blocks import is_whole, kept_by
from megagrow.growth.optimizer_rules import Progression
from megagrow.growth.plan import Growth
from megagrow.state.catalog import LogicalTensor

_LAYERS = 3  # inspected layers: the first, the middle and the last one of a kind
UNITS = "ffn"  # the axis whose units are compared and counted


@dataclass(frozen=True)
class Watched:
    """A matrix of a block.

    Attributes:
        tensor: its tensor.
        kept: the elements that existed before the growth, one progression per axis; None: all are
            new.
        twins: pairs of units that are copies of the same unit. Only for matrices that read the
            residual stream, along the axis `UNITS`.
    """

    tensor: LogicalTensor
    kept: tuple[Progression, ...] | None
    twins: tuple[tuple[int, int], ...] = ()

    @property
    def has_units(self) -> bool:
        """Whether its outputs are units that can be compared."""
        return self.tensor.role == "reader" and UNITS in self.tensor.axes


def watched(growth: Growth) -> tuple[Watched, ...]:
    """The matrices to inspect: in three layers with new elements, and in three layers without.

    A tensor whose old elements are not one progression per axis is left out, since its new elements
    cannot be identified by index (`growth.new_blocks`).
    """
    found: list[Watched] = []
    for tensor in growth.target:
        if not tensor.is_matrix or tensor.training != "trained":
            continue
        old = [block for block in growth.blocks(tensor) if not block.new]
        try:
            kept = kept_by(old)
        except ValueError:
            continue
        found.append(Watched(tensor, kept, _twins(growth, tensor)))
    grown = {one.tensor.places[0] for one in found if not _is_old(growth, one)}
    others = {one.tensor.places[0] for one in found} - grown
    places = _some(sorted(grown)) | _some(sorted(others))
    return tuple(one for one in found if grown and one.tensor.places[0] in places)


def _is_old(growth: Growth, one: Watched) -> bool:
    return is_whole(one.tensor, [b for b in growth.blocks(one.tensor) if not b.new])


def _some(places: Sequence[int]) -> set[int]:
    """The first, the middle and the last."""
    if len(places) <= _LAYERS:
        return set(places)
    last = len(places) - 1
    return {places[last * i // (_LAYERS - 1)] for i in range(_LAYERS)}


def _twins(growth: Growth, tensor: LogicalTensor) -> tuple[tuple[int, int], ...]:
    """Pairs of units with the same source: the first of them with each of the others."""
    if tensor.role != "reader" or UNITS not in tensor.axes:
        return ()
    at = tensor.axes.index(UNITS)
    copies: dict[tuple[str, int], list[int]] = {}
    for block in growth.blocks(tensor):
        axis = block.axes[at]
        for u in range(axis.length):
            source = (block.source, axis.source_start + u * axis.source_step)
            unit = axis.target_start + u * axis.target_step
            if unit not in copies.setdefault(source, []):
                copies[source].append(unit)
    pairs = ((units[0], other) for units in copies.values() for other in units[1:])
    return tuple(sorted(pairs))
