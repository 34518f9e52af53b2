"""A run's position in its data, and the rest of an epoch after a change of the sample length.

**Position.**  The numbers of consumed samples by length, in order: ``((32, 1000), (128, 500))``,
and of a mixture also which one.  Everything else is a function of it, the seed and the size of the
data.

**A change of length.**  The samples consumed so far are scattered over the epoch. The rest forms a
stream: the remaining windows, in the order of the data, and the few tokens after the last window.
Samples of the new length are windows of that stream, in their own seeded order, until the epoch is
over; the next epoch is cut from the whole data as usual. So no token is a label twice in an epoch,
and fewer tokens than one sample are left out of it, whatever the lengths. The price: where the
stream joins two stretches of text, a sample crosses from one to the other, as it does between
documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megagrow.data.mixture import Mixture
from megagrow.data.permutation import mixed, positions

Int64 = npt.NDArray[np.int64]
_BLOCK = 512  # windows per count; 64 bytes of bits
_CHUNK = 1 << 18  # windows processed together, a multiple of _BLOCK


class Taken(NamedTuple):
    """Consumed samples of one length and one mixture.

    Attributes:
        sequence: tokens of a sample; 0 for an unknown number, see `Position.measured`.
        samples: their number.
        mixture: where they are from; None for the dataset of a run that has just one.
    """

    sequence: int
    samples: int
    mixture: Mixture | None = None


@dataclass(frozen=True)
class Position:
    """Samples consumed so far.

    Attributes:
        taken: for each length and mixture, in order; neighbours differ.
    """

    taken: tuple[Taken, ...] = ()

    @property
    def samples(self) -> int:
        """The number of samples of all lengths."""
        return sum(part.samples for part in self.taken)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(tokens of a sample, samples), in order."""
        return tuple((part.sequence, part.samples) for part in self.taken)

    def split(self, sequence: int, mixture: Mixture | None = None) -> tuple[Position, int]:
        """For samples of this length and mixture: what was consumed before, and their number."""
        if self.taken and self.taken[-1][::2] == (sequence, mixture):
            return Position(self.taken[:-1]), self.taken[-1].samples
        return self, 0

    def after(self, samples: int, *, sequence: int, mixture: Mixture | None = None) -> Position:
        """The position after this many more samples of this length and mixture."""
        before, done = self.split(sequence, mixture)
        more = Taken(sequence, done + samples, mixture)
        return Position((*before.taken, more)) if samples else self

    def of(self, source: str, *, home: str | None = None) -> Position:
        """The position in one source.

        Args:
            source: its fingerprint.
            home: the fingerprint of the dataset that samples of no mixture are from.
        """
        found = Position()
        for sequence, samples, mixture in self.taken:
            if mixture is None:
                samples = samples if source == home else 0
            else:
                samples = mixture.taken(samples).get(source, 0)
            found = found.after(samples, sequence=sequence)
        return found

    def measured(self, sequence: int) -> Position:
        """Fill in the sample length for a state of an earlier version, which stored only the count.

        Those versions continued at the same number in the new length's order, which is what
        `sequence` for all of them means.
        """
        return Position(tuple(p._replace(sequence=p.sequence or sequence) for p in self.taken))

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds; `from_json` is its inverse."""
        mixtures = list(dict.fromkeys(p.mixture for p in self.taken if p.mixture is not None))
        taken = [
            [p.sequence, p.samples] + ([mixtures.index(p.mixture)] if p.mixture else [])
            for p in self.taken
        ]
        slots = [[list(slot) for slot in mixture.slots] for mixture in mixtures]
        more = {"mixtures": slots} if slots else {}
        return {"consumed_samples": self.samples, "taken": taken, **more}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Position:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        total = int(data["consumed_samples"])
        if "taken" not in data:
            return Position((Taken(0, total),) if total else ())
        mixtures = [
            Mixture(tuple((str(name), int(count)) for name, count in slots))
            for slots in data.get("mixtures", ())
        ]
        taken = []
        for length, count, *which in data["taken"]:
            if any(not 0 <= int(index) < len(mixtures) for index in which) or len(which) > 1:
                raise ValueError(f"mixture {which} of {len(mixtures)}")
            taken.append(Taken(int(length), int(count), *(mixtures[int(i)] for i in which)))
        found = Position(tuple(taken))
        if found.samples != total or any(min(part[:2]) < 1 for part in found.taken):
            raise ValueError(f"consumed_samples {total} and taken {list(found.taken)}")
        return found


@dataclass(frozen=True)
class Stretch:
    """The rest of the epoch that a position is in.

    Attributes:
        epoch: its number.
        taken: (tokens per sample, samples) consumed in this epoch.
        tokens: number of tokens left in it.
    """

    epoch: int
    taken: tuple[tuple[int, int], ...]
    tokens: int

    def after(self, sequence: int, samples: int, *, total: int) -> Stretch:
        """The rest after this many more samples, in data of `total` tokens."""
        here = self.tokens // sequence
        if samples < here:
            if samples == 0:
                return self
            left = self.tokens - samples * sequence
            return Stretch(self.epoch, (*self.taken, (sequence, samples)), left)
        epochs, rest = divmod(samples - here, total // sequence)
        taken = ((sequence, rest),) if rest else ()
        return Stretch(self.epoch + 1 + epochs, taken, total - rest * sequence)


class Stream:
    """The tokens of an epoch that samples of several lengths have not consumed, in data order.

    Args:
        total: number of tokens of the data.
        seed: of the order.
        stretch: the consumed samples, all of one epoch.
    """

    def __init__(self, *, total: int, seed: int, stretch: Stretch) -> None:
        self._layers: list[_Layer] = []
        length = total
        for depth, (sequence, taken) in enumerate(stretch.taken):
            key = layer_key(seed, epoch=stretch.epoch, depth=depth)
            layer = _Layer(length, sequence, taken, key)
            self._layers.append(layer)
            length = layer.left
        self.length = length

    @property
    def joins(self) -> int:
        """An upper bound on the number of joins, where the stream skips data."""
        return sum(layer.joins for layer in self._layers)

    def places(self, start: int, count: int) -> Int64:
        """The positions in the epoch of tokens [start, start + count), [count]."""
        found = np.arange(start, start + count, dtype=np.int64)
        for layer in reversed(self._layers):
            found = layer.places(found)
        return found


def layer_key(seed: int, *, epoch: int, depth: int) -> int:
    """The key of an epoch's order; `depth` is the number of earlier lengths in it."""
    return mixed(seed, epoch, depth) if depth else mixed(seed, epoch)


class _Layer:
    """The remaining windows of a stream: one bit each, and a count per block of windows."""

    def __init__(self, length: int, sequence: int, taken: int, key: int) -> None:
        self._sequence, self._windows = sequence, length // sequence
        self.left = length - taken * sequence
        self._bits = np.empty(-(-self._windows // 8), np.uint8)
        counts = [0]
        self.joins = 0
        before = True
        for start in range(0, self._windows, _CHUNK):
            stop = min(start + _CHUNK, self._windows)
            order = positions(np.arange(start, stop), size=self._windows, key=key)
            free = order >= taken
            # A stretch begins at a free window that follows a consumed one.
            self.joins += int((free & ~np.concatenate([[before], free[:-1]])).sum())
            before = bool(free[-1])
            self._bits[start // 8 : -(-stop // 8)] = np.packbits(free)
            sums = np.add.reduceat(free.astype(np.int64), np.arange(0, stop - start, _BLOCK))
            counts += sums.tolist()
        self._before = np.cumsum(counts)  # of free windows, by block

    def places(self, at: Int64) -> Int64:
        """The positions of remaining tokens in the stream that the windows were cut from."""
        free = int(self._before[-1])
        number, inside = np.divmod(at, self._sequence)
        window = np.empty_like(number)
        for one in np.unique(number):
            # After the free windows come the tokens that were in no window.
            window[number == one] = (
                self._window(int(one)) if one < free else self._windows + int(one) - free
            )
        return window * self._sequence + inside

    def _window(self, number: int) -> int:
        """The free window with this number."""
        block = int(np.searchsorted(self._before, number, side="right")) - 1
        bits = np.unpackbits(self._bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8])
        inside = np.flatnonzero(bits)[number - int(self._before[block])]
        return block * _BLOCK + int(inside)
