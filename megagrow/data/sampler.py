"""Which tokens sample k is made of: a function of data, seed and k alone.

**Windows.**  The tokens of all documents lie end to end, the end joined to the
beginning.  In every epoch a seeded offset in ``[0, tokens)`` is drawn; from there
on window j covers the tokens ``offset + j * sequence`` and the ``sequence + 1``
next.  Inputs are the first ``sequence`` of them, labels the last.  An epoch has
``tokens // sequence`` windows, so each token is a label at most once in an epoch
and the few left over are others in each.

**Order.**  Sample k is window ``permutation(k mod windows)`` of epoch
``k // windows``.  The permutation is computed, not stored: a Feistel network over
the next power of four, walked until it falls into the range.  It needs no memory
and no library's random numbers, so it stays the same for ever.

**State.**  One integer, ``consumed_samples``.  Samples taken so far are
``[0, consumed_samples)``, whatever ranks, batches or restarts took them.

**Growing the sequence.**  Sample k of the new length is what this rule says for
the new length; the run goes on at ``k = consumed_samples``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megagrow.data.indexed import IndexedDataset
from megagrow.errors import DataError

Int64 = npt.NDArray[np.int64]
# How validation windows are chosen; a run that goes on says so if that has changed.
VALIDATION = "spread over the whole split"
VALIDATION_BEFORE = "the first of the split"  # where a checkpoint does not tell
_MASK = (1 << 64) - 1
_ROUNDS = 8


def mix(value: int) -> int:
    """Scatter an unsigned 64-bit integer: the SplitMix64 finaliser (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mixed(*values: int) -> int:
    """One unsigned 64-bit integer that depends on all ``values`` and their order."""
    state = 0
    for value in values:
        state = mix(state ^ (value & _MASK))
    return state


def permuted(position: int, *, size: int, key: int) -> int:
    """Where the permutation ``key`` of ``range(size)`` sends ``position``."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    # The network permutes [0, 4**half); its walk from inside the range comes back
    # into it, which makes a permutation of the range itself.
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mixed(key, number, right) & mask)
        position = (left << half) | right
        if position < size:
            return position


@dataclass(frozen=True)
class SampleIndex:
    """Random access to the training samples of ``dataset``.

    Args:
        dataset: the training split.
        sequence: tokens the model sees; a sample has one more.
        seed: of the order.

    Raises:
        DataError: the dataset is smaller than one sample.
    """

    dataset: IndexedDataset
    sequence: int
    seed: int

    def __post_init__(self) -> None:
        _require_window(self.dataset, self.sequence)

    @property
    def windows(self) -> int:
        """Number of samples in one epoch."""
        return self.dataset.total_tokens // self.sequence

    def sample(self, k: int) -> Int64:
        """Sample k >= 0 of the run, ``[sequence + 1]`` token ids.

        Raises:
            DataError: an id in it that the vocabulary does not have.
        """
        if k < 0:
            raise IndexError(f"sample {k}")
        epoch, position = divmod(k, self.windows)
        total = self.dataset.total_tokens
        key = mixed(self.seed, epoch)
        window = permuted(position, size=self.windows, key=key)
        start = (mix(key) + window * self.sequence) % total
        # A dataset has more tokens than a window, so the end wraps once at most.
        return self.dataset.window(start, self.sequence + 1, f"sample {k}")

    def batch(self, start: int, count: int) -> Int64:
        """Samples ``[start, start + count)``, ``[count, sequence + 1]`` token ids."""
        rows = np.empty((count, self.sequence + 1), np.int64)
        for row in range(count):
            rows[row] = self.sample(start + row)
        return rows


def rank_slice(
    consumed_samples: int, *, micro: int, accumulation: int, data_rank: int, data_size: int
) -> list[int]:
    """First sample number of each micro-batch that a data-parallel rank takes in one step.

    Micro-batch m of rank r is samples ``[first, first + micro)``.  A step over all
    ranks is samples ``[consumed_samples, consumed_samples + micro * accumulation *
    data_size)`` in order, for every split of that product.
    """
    if not 0 <= data_rank < data_size:
        raise ValueError(f"data rank {data_rank} of {data_size}")
    return [
        consumed_samples + (number * data_size + data_rank) * micro
        for number in range(accumulation)
    ]


def validation_windows(dataset: IndexedDataset, *, sequence: int, count: int) -> list[int]:
    """Which windows of a split validate: one of each of ``count`` equal parts, or all.

    Window j covers the tokens ``j * sequence`` and the ``sequence + 1`` next.  Which window of a
    part it is, looks random and is a function of the data's size alone: runs with other seeds
    validate on the same.

    Raises:
        DataError: the split has fewer tokens than one window.
    """
    _require_window(dataset, sequence)
    windows = (dataset.total_tokens - 1) // sequence
    if count >= windows:
        return list(range(windows))
    borders = [number * windows // count for number in range(count + 1)]
    return [
        first + mixed(windows, number) % (last - first)
        for number, (first, last) in enumerate(pairwise(borders))
    ]


def validation_samples(dataset: IndexedDataset, *, sequence: int, count: int) -> Int64:
    """``count`` windows spread over a split, or all that it has if they are fewer.

    Returns:
        ``[windows, sequence + 1]`` token ids; no two have a label in common.

    Raises:
        DataError: the split has fewer tokens than one window, or an id that the vocabulary does
            not have.
    """
    windows = validation_windows(dataset, sequence=sequence, count=count)
    return np.stack(
        [
            dataset.window(number * sequence, sequence + 1, f"validation window {number}")
            for number in windows
        ]
    )


def _require_window(dataset: IndexedDataset, sequence: int) -> None:
    if sequence < 1:
        raise ValueError(f"sequence {sequence}")
    if dataset.total_tokens <= sequence:
        raise DataError(
            f"{dataset.prefix}: too few tokens for one sample",
            found=f"{dataset.total_tokens} tokens",
            expected=f"at least {sequence + 1} (model.sequence + 1)",
            mend="a shorter model.sequence, more text, or another --validation-fraction",
        )
