"""Statistics of tensors that a growth depends on, bit-identical in every layout.

Floating-point sums depend on their order, hence on the layout. So the largest magnitude is found
first, which is exact in any order, and everything is then summed as integers: fractions of that
magnitude (or of its square) in units as fine as 63 bits allow.  Each rank sums what it holds, in
bounded pieces, and two collectives add it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from megagrow.errors import GrowthError
from megagrow.state.boxes import Box, split_box, whole
from megagrow.state.catalog import MASTER, Slot
from megagrow.transfer.ends import Channel, Source
from megagrow.transfer.moves import Locator
from megagrow.transfer.state_map import Drawn, Level, StateMap, Statistic

Statistics = Mapping[Statistic, torch.Tensor]

_BYTES_AN_ELEMENT = 32  # float64 and int64 temporaries of a piece
_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # per piece: fits a cache, or fills a GPU


def required(state_map: StateMap, slots: Sequence[Slot] = (MASTER,)) -> list[Statistic]:
    """The statistics that a state map's fills and noise need, each once, in a fixed order."""
    found: dict[Statistic, None] = {}
    for tensor in state_map.target:
        for slot in slots:
            if slot.kind != "parameter" or not slot.of(tensor):
                continue
            rule = state_map.fill(tensor, slot)
            if isinstance(rule, Drawn | Level):
                found[rule.statistic] = None
            for copy in state_map.copies(tensor, slot):
                if copy.noise is not None and copy.noise.statistic is not None:
                    found[copy.noise.statistic] = None
    return list(found)


def measure(
    needed: Sequence[Statistic],
    *,
    old: Source,
    locator: Locator,
    rank: int | None = None,
    channel: Channel | None = None,
    device: torch.device | str = "cpu",
    staging_bytes: int,
) -> dict[Statistic, torch.Tensor]:
    """The values of statistics, float64 on the CPU, of shape `Statistic.kept`.

    Args:
        needed: the statistics; the same on all ranks.
        old: the source state.
        locator: which rank holds which of its boxes.
        rank: this rank, which sums what it holds; None: this process reads everything.
        channel: to the other ranks.
        device: of the tensors that are reduced over the ranks.
        staging_bytes: memory per piece.

    Raises:
        GrowthError: on all ranks, if a tensor has values that are not finite.
    """
    if not needed:
        return {}
    limit = _piece(staging_bytes, device)

    def pieces(statistic: Statistic) -> Iterable[tuple[Box, torch.Tensor]]:
        everything = whole(statistic.shape)
        for holder, part in locator.sources(statistic.tensor, everything, reader=0):
            if rank is None or holder == rank:
                for box in split_box(part, limit):
                    yield box, old.read(statistic.tensor, MASTER.name, box)

    largest = torch.zeros(len(needed), dtype=torch.float64, device=device)
    for i, statistic in enumerate(needed):
        for _, values in pieces(statistic):
            # Comparisons with NaN are false, so NaN is replaced by infinity.
            peak = values.abs().max().to(largest).nan_to_num(nan=math.inf, posinf=math.inf)
            largest[i] = torch.maximum(largest[i], peak)
    if channel is not None and channel.world > 1:
        channel.reduce(largest, operation="max")
    peaks: list[float] = largest.tolist()
    for statistic, peak_value in zip(needed, peaks, strict=True):
        if not math.isfinite(peak_value):
            raise GrowthError(
                f"{statistic.tensor} has values that are not finite, so it cannot be grown",
                fix="go back to a checkpoint before the loss became NaN or infinite",
            )
    sums = _summed(needed, peaks, pieces, device)
    if channel is not None and channel.world > 1:
        channel.reduce(sums, operation="sum")
    parts = sums.cpu().split([math.prod(s.kept) for s in needed])
    return {
        statistic: _value(statistic, peak, part)
        for statistic, peak, part in zip(needed, peaks, parts, strict=True)
    }


def measuring_bytes(
    needed: Sequence[Statistic], staging_bytes: int, device: torch.device | str
) -> int:
    """The staging memory that measuring takes."""
    longest = max((math.prod(statistic.shape) for statistic in needed), default=0)
    return min(longest, _piece(staging_bytes, device)) * _BYTES_AN_ELEMENT


def _piece(staging_bytes: int, device: torch.device | str) -> int:
    return max(1, min(staging_bytes // _BYTES_AN_ELEMENT, _ELEMENTS[torch.device(device).type]))


def _summed(
    needed: Sequence[Statistic],
    peaks: Sequence[float],
    pieces: Callable[[Statistic], Iterable[tuple[Box, torch.Tensor]]],
    device: torch.device | str,
) -> torch.Tensor:
    """This rank's sums as integers, all statistics concatenated."""
    parts = []
    for statistic, peak in zip(needed, peaks, strict=True):
        total = torch.zeros(statistic.kept, dtype=torch.int64, device=device)
        squares = statistic.kind == "rms"
        # An element's share of the peak (or of its square) in units of the integers.
        scale = 2.0 ** (_bits(statistic) / (2 if squares else 1)) / peak if peak else 0.0
        for box, values in pieces(statistic) if peak else ():
            shares = values.to(torch.float64, copy=True).mul_(scale)
            counts = (shares.mul_(shares) if squares else shares).round_().long()
            axes = range(counts.dim()) if statistic.axis is None else [statistic.axis]
            reduced = counts.sum(tuple(axes), keepdim=True) if counts.dim() else counts
            place = tuple(
                slice(0, 1) if statistic.axis in (None, at) else along
                for at, along in enumerate(box.slices)
            )
            total[place] += reduced.to(total.device)
        parts.append(total.view(-1))
    return torch.cat(parts)


def _bits(statistic: Statistic) -> int:
    """Bits per element, such that the sum does not overflow."""
    return 62 - statistic.count.bit_length()


def _value(statistic: Statistic, peak: float, total: torch.Tensor) -> torch.Tensor:
    mean = total.double().view(statistic.kept) / 2.0 ** _bits(statistic) / statistic.count
    return (mean.sqrt_() if statistic.kind == "rms" else mean) * peak
