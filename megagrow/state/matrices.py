"""The linear maps inside a logical tensor; Muon orthogonalises each one separately.

Fused weights hold several: queries, keys and values are three maps from the residual stream, and
the gate and up projections are two. Each covers all heads, as in Jordan et al., "Muon: an optimizer
for hidden layers in neural networks" (2024).
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
        rows, columns: number of its outputs and inputs; the part of the tensor, laid out row by
            row, has this shape, up to a fixed permutation of the rows.
    """

    index: tuple[slice, ...]
    rows: int
    columns: int

    @property
    def scale(self) -> float:
        """The factor of its orthogonalised update: sqrt(max(1, rows / columns))."""
        return math.sqrt(max(1.0, self.rows / self.columns))


# Output axes of matrices: lengths of the trailing parts that are matrices of their own.
_CUTS: dict[str, tuple[int, ...]] = {
    "embed": (),
    "kv_group": (),
    "projection": (1, 1),
    "query": (),
    "head_dim": (),
    "ffn": (),
    "gate_up": (1,),
}


def matrices(tensor: LogicalTensor) -> tuple[Matrix, ...]:
    """The matrices of a tensor; empty if it is not a weight matrix of a block.

    Raises:
        ValueError: an output axis whose matrices are not known.
    """
    if not tensor.is_matrix:
        return ()
    for axis, meaning in enumerate(tensor.axes[: len(tensor.axes) - len(tensor.reads)]):
        if meaning not in _CUTS:
            raise ValueError(
                f"{tensor.name}: axis {meaning!r} is not known to lie in one matrix, or to be cut "
                f"into several; known are {', '.join(_CUTS)}"
            )
        if _CUTS[meaning]:
            lengths = (tensor.shape[axis] - sum(_CUTS[meaning]), *_CUTS[meaning])
            parts, start = [], 0
            for length in lengths:
                index = [slice(0, n) for n in tensor.shape]
                index[axis] = slice(start, start + length)
                parts.append(_matrix(tensor, tuple(index)))
                start += length
            return tuple(parts)
    return (_matrix(tensor, tuple(slice(0, n) for n in tensor.shape)),)


def _matrix(tensor: LogicalTensor, index: tuple[slice, ...]) -> Matrix:
    """Output axes come first, input axes last."""
    sizes = [part.stop - part.start for part in index]
    columns = math.prod(sizes[len(sizes) - len(tensor.reads) :])
    return Matrix(index, math.prod(sizes) // columns, columns)
