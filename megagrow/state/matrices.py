"""The linear maps inside a logical tensor, which Muon orthogonalises each by itself.

Fused weights hold several: queries, keys and values are three maps from the stream, and a
gate and its partner are two.  Each runs over all heads, as they do in
Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megagrow.state.catalog import LogicalTensor


@dataclass(frozen=True)
class Matrix:
    """One linear map.

    Attributes:
        index: where it is in its tensor.
        rows, columns: number of its outputs and of its inputs; the part of the tensor, laid out
            row by row, has this shape, up to an order of the rows that depends on nothing.
    """

    index: tuple[slice, ...]
    rows: int
    columns: int

    @property
    def scale(self) -> float:
        """What its orthogonalised update is multiplied by: sqrt(max(1, rows / columns))."""
        return math.sqrt(max(1.0, self.rows / self.columns))


def matrices(tensor: LogicalTensor) -> tuple[Matrix, ...]:
    """The matrices of a tensor; none where it is no matrix of a block."""
    if not tensor.is_matrix:
        return ()
    cuts = {"projection": (1, 1), "gate_up": (1,)}  # lengths of the last parts of an axis
    for axis, meaning in enumerate(tensor.axes):
        if meaning in cuts:
            lengths = (tensor.shape[axis] - sum(cuts[meaning]), *cuts[meaning])
            parts, start = [], 0
            for length in lengths:
                index = [slice(0, n) for n in tensor.shape]
                index[axis] = slice(start, start + length)
                parts.append(_matrix(tensor, tuple(index)))
                start += length
            return tuple(parts)
    return (_matrix(tensor, tuple(slice(0, n) for n in tensor.shape)),)


def _matrix(tensor: LogicalTensor, index: tuple[slice, ...]) -> Matrix:
    """Outputs come first, and what is read last."""
    sizes = [part.stop - part.start for part in index]
    columns = math.prod(sizes[len(sizes) - len(tensor.reads) :])
    return Matrix(index, math.prod(sizes) // columns, columns)
