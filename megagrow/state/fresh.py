"""Initial values of any box of a logical tensor, the same in every layout.

Element i (row-major) of a tensor is a function of the run's seed, the
tensor's name and i alone, so a rank generates its own shard without generating the
rest, and the whole model starts the same on one process as on a thousand.
The generator is Philox, a counter-based one (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), as NumPy implements it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from megagrow.state.boxes import Box, flat_offset
from megagrow.state.catalog import LogicalTensor

_DRAWS_PER_COUNT = 4  # one step of Philox's counter yields four 64-bit words
_PART = 1 << 15  # values generated at a time


def fresh(tensor: LogicalTensor, box: Box, *, seed: int) -> np.ndarray:
    """Initial values of one box of a tensor: float64, of the box's shape."""
    if tensor.init.kind == "zeros":
        return np.zeros(box.shape)
    if tensor.init.kind == "ones":
        return np.ones(box.shape)
    if tensor.init.kind == "constant":
        return np.full(box.shape, tensor.init.std)
    return normals(tensor.shape, box, name=tensor.name, seed=seed) * tensor.init.std


def normals(shape: Sequence[int], box: Box, *, name: str, seed: int) -> np.ndarray:
    """Standard normal values of one box of an array of this shape: float64, of the box's shape."""
    runs = [_normals(seed, name, start, length) for start, length in _runs(shape, box)]
    return np.concatenate(runs).reshape(box.shape)


def _runs(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """The contiguous flat ranges that a box covers, in row-major order."""
    tail = len(box.shape)
    while tail > 0 and box.shape[tail - 1] == shape[tail - 1]:
        tail -= 1
    # Axes from `tail` on are whole, so a range spans them and the box's part of axis tail-1.
    outer = box.shape[: max(tail - 1, 0)]
    length = box.volume // int(np.prod(outer, dtype=np.int64))
    for index in np.ndindex(*outer):
        position = [o + i for o, i in zip(box.offset, index, strict=False)]
        position += box.offset[len(outer) :]
        yield flat_offset(shape, position), length


def _normals(seed: int, name: str, start: int, length: int) -> np.ndarray:
    """Standard normal values at flat positions [start, start + length), by Box-Muller."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    philox = np.random.Philox(key=key)
    philox.advance(start // _DRAWS_PER_COUNT)
    generator = np.random.Generator(philox)

    def draw(count: int) -> np.ndarray:
        """Raw 64-bit words of the generator; unlike `random_raw` this releases the GIL."""
        return generator.integers(0, 2**64 - 1, count, dtype=np.uint64, endpoint=True)

    draw(start % _DRAWS_PER_COUNT)
    values = np.empty(length)
    # In place and in cache-sized parts: allocating memory costs more than the arithmetic.
    for first in range(0, length, _PART):
        u: np.ndarray = values[first : first + _PART]
        words = draw(len(u))
        v = (words & np.uint64(0xFFFFFFFF)).astype(np.float64)
        words >>= np.uint64(32)
        np.copyto(u, words, casting="unsafe")
        u += 0.5
        u /= 2.0**32
        np.log(u, out=u)
        u *= -2.0
        np.sqrt(u, out=u)
        v /= 2.0**32
        v *= 2.0 * np.pi
        np.cos(v, out=v)
        u *= v
    return values
