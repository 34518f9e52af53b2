"""Pseudo-random permutations that are computed, not stored, and never change between versions.

A Feistel network permutes the next power of four; cycle walking restricts it to a permutation of
the range itself. It needs no memory and no library's random numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
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
    """The image of ``position`` under the permutation ``key`` of ``range(size)``."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mixed(key, number, right) & mask)
        position = (left << half) | right
        if position < size:
            return position


def positions(values: Int64, *, size: int, key: int) -> Int64:
    """The inverse of `permuted`, for an array of values."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    result = values.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        value = result[walking]
        left, right = value >> shift, value & mask
        for number in reversed(range(_ROUNDS)):
            state = np.uint64(mixed(key, number))
            left, right = right ^ (_mix(state ^ left) & mask), left
        result[walking] = (left << shift) | right
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)


def _mix(value: UInt64) -> UInt64:
    """`mix` of an array; unsigned integers wrap around."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
