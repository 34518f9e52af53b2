"""The validation split: a share of the tokens, whatever the documents' lengths.

Whole documents are taken in the order of a seeded hash, until the validation set has the requested
number of tokens, to within half a document. A document that is longer than a quarter of that is
*long*: only its last tokens go there, and the rest is trained on. If there are few documents, as in
a directory of two books, all are long and each contributes the same. A border is between two
tokens; both parts end and begin like documents.

A document with exact copies elsewhere is used only if there is not enough without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megagrow.data.permutation import mixed

_LEAST_DOCUMENTS = 4  # in the validation set, if the corpus has as many
Int64 = npt.NDArray[np.int64]
Sums = npt.NDArray[Any]
SUM_BYTES = 16
SUM = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True)
class Chosen:
    """The validation part.

    Attributes:
        tokens: ``[documents]``, number of tokens from the end of each document: 0, some or all.
        cut: number of documents of which only a part goes there.
        copies: number of documents that occur more than once in the corpus.
        shared: number of validation documents that may be in the training set as well.
    """

    tokens: Int64
    cut: int
    copies: int
    shared: int


def choose(lengths: Int64, sums: Sums, *, fraction: float, seed: int) -> Chosen:
    """Choose the validation part.

    Args:
        lengths: ``[documents]``, in tokens; at least two in total.
        sums: ``[documents]`` of dtype :data:`SUM`, a checksum of each text.
        fraction: fraction of the tokens, between 0 and 1.
        seed: seed of the choice.
    """
    total = int(lengths.sum())
    target = min(max(1, round(fraction * total)), total - 1)
    repeated = _repeated(sums)
    hashes = np.fromiter((mixed(seed, 1, n) for n in range(len(lengths))), np.uint64)
    alone = lengths[~repeated]
    offered = alone if int(alone.sum()) > target else lengths
    most = max(target // _LEAST_DOCUMENTS, _level(offered, target))

    tokens = np.zeros(len(lengths), np.int64)
    taken = shared = 0
    for number in np.lexsort((hashes, repeated)):
        length = int(lengths[number])
        if length > most:
            share = min(most, target - taken)
        elif 2 * (target - taken) >= length and taken + length < total:
            share = length
        else:
            break
        tokens[number] = share
        taken += share
        shared += bool(repeated[number])
        if taken >= target:
            break
    cut = int(((tokens > 0) & (tokens < lengths)).sum())
    return Chosen(tokens, cut, int(repeated.sum()), shared)


def _level(lengths: Int64, target: int) -> int:
    """The smallest per-document limit of tokens that reaches the target."""
    rising = np.sort(lengths)
    # At limit rising[i] shorter documents contribute all their tokens, the others the limit.
    made = np.cumsum(rising) + rising * np.arange(len(rising) - 1, -1, -1)
    first = int(np.searchsorted(made, target))
    shorter = int(rising[:first].sum())
    return -(-(target - shorter) // max(1, len(rising) - first))


def _repeated(sums: Sums) -> npt.NDArray[np.bool_]:
    """``[documents]``: whether another document has the same text."""
    order = np.lexsort((sums["low"], sums["high"]))
    ordered = sums[order]
    same = ordered[1:] == ordered[:-1]
    found = np.zeros(len(sums), np.bool_)
    found[order[1:][same]] = True
    found[order[:-1][same]] = True
    return found
