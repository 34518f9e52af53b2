"""The tokens of sample k: a function of data, seed and k alone.

**Windows.**  The tokens of all documents are concatenated, and wrap around at the end.  In every
epoch a seeded offset in ``[0, tokens)`` is drawn; from there on window j covers the tokens ``offset
+ j * sequence`` and the ``sequence + 1`` next.  Inputs are the first ``sequence`` of them, labels
the last.  An epoch has ``tokens // sequence`` windows, so each token is a label at most once in an
epoch, and the few left over differ between epochs.

**Order.**  Sample k is window ``permutation(k mod windows)`` of epoch
``k // windows``; the permutation is computed (`megagrow.data.permutation`).

**State.**  The number of consumed samples by length (`megagrow.data.position`): samples ``[0,
count)`` of each, regardless of ranks, batches and restarts.

**Another length.**  Samples of the new length are numbered from 0 again. The rest of the epoch is
cut into new windows first, then whole epochs follow: no token is a label twice in an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megagrow.data.indexed import IndexedDataset
from megagrow.data.permutation import mix, mixed, permuted
from megagrow.data.position import Stream, Stretch, layer_key
from megagrow.data.token_files import TokenRanges
from megagrow.errors import DataError

Int64 = npt.NDArray[np.int64]
Tokens = IndexedDataset | TokenRanges
# How validation windows are chosen; a resumed run reports it if that has changed.
VALIDATION = "spread over the whole split"
VALIDATION_BEFORE = "the first of the split"  # if a checkpoint does not say


@dataclass(frozen=True)
class SampleIndex:
    """Random access to the training samples of ``dataset`` that have one length.

    Args:
        dataset: the training split.
        sequence: tokens that the model sees; a sample has one more.
        seed: of the order.
        before: (tokens per sample, samples) of other lengths that the run consumed before.

    Raises:
        DataError: the dataset is smaller than one sample.
    """

    dataset: Tokens
    sequence: int
    seed: int
    before: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _require_window(self.dataset, self.sequence)

    @property
    def windows(self) -> int:
        """Number of samples per epoch."""
        return self.dataset.total_tokens // self.sequence

    @cached_property
    def begun(self) -> Stretch:
        """The rest of the epoch that samples of other lengths ended in."""
        total = self.dataset.total_tokens
        found = Stretch(0, (), total)
        for sequence, samples in self.before:
            found = found.after(sequence, samples, total=total)
        return found

    @cached_property
    def _left(self) -> Stream | None:
        """The same, token by token; None for a whole epoch."""
        total, begun = self.dataset.total_tokens, self.begun
        return Stream(total=total, seed=self.seed, stretch=begun) if begun.taken else None

    @property
    def recut(self) -> str | None:
        """A description of what a change of length does to the epoch; None if nothing."""
        if self._left is None:
            return None
        begun = self.begun
        count = begun.tokens // self.sequence
        return (
            f"samples have {self.sequence:,} tokens from here on: the {begun.tokens:,} tokens that "
            f"are left of epoch {begun.epoch} make {count:,} of them, none is seen twice and "
            f"{begun.tokens - count * self.sequence:,} are left out; "
            f"up to {self._left.joins:,} times a sample joins text that is not adjacent"
        )

    def sample(self, k: int) -> Int64:
        """Sample k >= 0 of this length, ``[sequence + 1]`` token ids.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        if k < 0:
            raise IndexError(f"sample {k}")
        total, begun = self.dataset.total_tokens, self.begun
        first = begun.tokens // self.sequence
        if self._left is not None and k < first:
            key = layer_key(self.seed, epoch=begun.epoch, depth=len(begun.taken))
            window = permuted(k, size=first, key=key)
            labels = self._left.places(window * self.sequence, self.sequence)
            # Inputs are the token before the first label, and all labels except the last.
            places = mix(layer_key(self.seed, epoch=begun.epoch, depth=0)) % total + np.concatenate(
                [labels[:1], labels + 1]
            )
            return self.dataset.at(places % total, f"sample {k}")
        epochs, position = divmod(k - first, self.windows)
        key = layer_key(self.seed, epoch=begun.epoch + 1 + epochs, depth=0)
        window = permuted(position, size=self.windows, key=key)
        start = (mix(key) + window * self.sequence) % total
        # A dataset has more tokens than a window, so it wraps around at most once.
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
    """First sample number of each micro-batch of a data-parallel rank in one step.

    Micro-batch m of rank r is samples ``[first, first + micro)``.  A step over all
    ranks is samples ``[consumed_samples, consumed_samples + micro * accumulation *
    data_size)`` in order, for every factorisation of that product.
    """
    if not 0 <= data_rank < data_size:
        raise ValueError(f"data rank {data_rank} of {data_size}")
    return [
        consumed_samples + (number * data_size + data_rank) * micro
        for number in range(accumulation)
    ]


def validation_windows(dataset: Tokens, *, sequence: int, count: int) -> list[int]:
    """The validation windows of a split: one from each of ``count`` equal parts, or all.

    Window j covers the tokens ``j * sequence`` and the ``sequence + 1`` next.  The choice within a
    part is pseudo-random, but a function of the data's size alone: runs with different seeds
    validate on the same windows.

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


def validation_samples(dataset: Tokens, *, sequence: int, count: int) -> Int64:
    """``count`` windows spread over a split, or all if there are fewer.

    Returns:
        ``[windows, sequence + 1]`` token ids; no two have a label in common.

    Raises:
        DataError: the split has fewer tokens than one window, or an id is not in the vocabulary.
    """
    windows = validation_windows(dataset, sequence=sequence, count=count)
    return np.stack(
        [
            dataset.window(number * sequence, sequence + 1, f"validation window {number}")
            for number in windows
        ]
    )


def _require_window(dataset: Tokens, sequence: int) -> None:
    if sequence < 1:
        raise ValueError(f"sequence {sequence}")
    if dataset.total_tokens <= sequence:
        raise DataError(
            f"{dataset.prefix}: too few tokens for one sample",
            found=f"{dataset.total_tokens} tokens",
            expected=f"at least {sequence + 1} (model.sequence + 1)",
            fix="a shorter model.sequence, more text, or another --validation-fraction",
        )
