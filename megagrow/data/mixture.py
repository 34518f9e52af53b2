"""Mixtures of datasets: which source sample k comes from, without a table that grows with samples.

**Order.**  Samples come in periods of 2^18.  Each source has a whole number of places in a period,
its *slots*: its share, rounded to the nearest 2^-18 (largest remainders).  Within the period its
samples are spread evenly: the i-th of n stands at (i + 1/2) / n, and the samples of all sources are
sorted by that.  So any run of samples has each source's share to within about one sample a source,
as in Megatron's blending index, which is a table of all samples instead.

**Position.**  The number of samples taken from each source is a function of the mixture and of the
number of samples taken from the mixture; a run stores these (`megagrow.data.position`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from megagrow.errors import ConfigError

PERIOD = 1 << 18


@dataclass(frozen=True)
class Mixture:
    """The shares of datasets, by their fingerprints.

    Attributes:
        slots: (fingerprint, samples of each `PERIOD`), sorted by fingerprint; their sum is
            `PERIOD`.
    """

    slots: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.slots]
        if names != sorted(set(names)) or min(n for _, n in self.slots) < 1:
            raise ValueError(f"slots {self.slots}")
        if sum(count for _, count in self.slots) != PERIOD:
            raise ValueError(f"slots {self.slots} do not sum to {PERIOD}")

    @staticmethod
    def of(weights: Mapping[str, float]) -> Mixture:
        """The mixture of these weights, by fingerprint; only their ratios matter.

        Raises:
            ConfigError: a share is too small for a period.
        """
        names = sorted(weights)
        total = sum(weights.values())
        exact = [weights[name] / total * PERIOD for name in names]
        counts = [int(share) for share in exact]
        largest = sorted(range(len(names)), key=lambda i: (counts[i] - exact[i], names[i]))
        for index in largest[: PERIOD - sum(counts)]:
            counts[index] += 1
        if min(counts) < 1:
            share = min(weights.values()) / total
            raise ConfigError(
                "data.sources: a weight is too small",
                found=f"a share of {share:.1e}",
                expected=f"at least {1 / PERIOD:.1e} (one sample in {PERIOD:,})",
                fix="leave the source out, or join it with another",
            )
        return Mixture(tuple(zip(names, counts, strict=True)))

    @property
    def fingerprint(self) -> str:
        """sha256 of the shares."""
        return hashlib.sha256(json.dumps(self.slots).encode()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """The fingerprints of the sources."""
        return tuple(name for name, _ in self.slots)

    def share(self, name: str) -> float:
        """The share of a source, after rounding."""
        return dict(self.slots)[name] / PERIOD

    def at(self, k: int) -> tuple[int, int]:
        """The index of the source of sample k >= 0, and which of that source's samples it is."""
        source, number, _ = _table(tuple(count for _, count in self.slots))
        periods, place = divmod(k, PERIOD)
        index = int(source[place])
        return index, periods * self.slots[index][1] + int(number[place])

    def taken(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples each source gives."""
        _, _, places = _table(tuple(count for _, count in self.slots))
        periods, rest = divmod(samples, PERIOD)
        return {
            name: periods * count + int(np.searchsorted(places[index], rest))
            for index, (name, count) in enumerate(self.slots)
        }

    def last(self, index: int, number: int) -> int:
        """The number of samples of the mixture up to, but without, a source's sample `number`."""
        _, _, places = _table(tuple(count for _, count in self.slots))
        periods, rest = divmod(number, self.slots[index][1])
        return periods * PERIOD + int(places[index][rest])


def parts_of(count: int, weights: Sequence[float], multiple: int) -> list[int]:
    """`count` in the proportion of the weights (largest remainders), at least `multiple` each."""
    if len(weights) == 1:
        return [count]
    total, units = sum(weights), count // multiple
    exact = [weight / total * units for weight in weights]
    parts = [max(1, int(part)) for part in exact]
    for index in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i]):
        if sum(parts) < units:
            parts[index] += 1
    return [part * multiple for part in parts]


@cache
def _table(
    counts: tuple[int, ...],
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32], list[npt.NDArray[np.int64]]]:
    """For each place of a period its source and that source's sample; each source's places.

    Cached, 1.6 MB and 2 MB more for the places: a run has few mixtures.
    """
    source = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    # Equal quotients are equal floats: IEEE division is exact to the last bit on every machine.
    key = np.concatenate([(2 * np.arange(n, dtype=np.float64) + 1) / (2 * n) for n in counts])
    number = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    order = np.lexsort((source, key))
    source, number = source[order], number[order]
    return source, number, [np.flatnonzero(source == index) for index in range(len(counts))]
