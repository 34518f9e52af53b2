"""Fresh values of any box of a logical tensor, the same in every layout.

Element i (row-major) of a tensor is a function of the run's seed, the
tensor's name and i alone, so a rank makes its own shard without making the
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


def fresh(tensor: LogicalTensor, box: Box, *, seed: int) -> np.ndarray:
    """Initial values of one box of a tensor: float64, of the box's shape."""
    if tensor.init.kind == "zeros":
        return np.zeros(box.shape)
    if tensor.init.kind == "ones":
        return np.ones(box.shape)
    return normals(tensor.shape, box, name=tensor.name, seed=seed) * tensor.init.std


def normals(shape: Sequence[int], box: Box, *, name: str, seed: int) -> np.ndarray:
    """Standard normal values of one box of an array of this shape: float64, of the box's shape."""
    runs = [_normals(seed, name, start, length) for start, length in _runs(shape, box)]
    return np.concatenate(runs).reshape(box.shape)


def _runs(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """The stretches of flat positions that a box covers, in row-major order."""
    tail = len(box.shape)
    while tail > 0 and box.shape[tail - 1] == shape[tail - 1]:
        tail -= 1
    # Axes from `tail` on are whole, so a stretch spans them and the box's part of axis tail-1.
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
    generator = np.random.Philox(key=key)
    generator.advance(start // _DRAWS_PER_COUNT)
    skip = start % _DRAWS_PER_COUNT
    words = generator.random_raw(skip + length)[skip:]
    # One 64-bit word an element, split into two 32-bit uniforms; u is never 0.
    u = ((words >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32
    v = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    return np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
