"""The rate factors of the `exact` policy, with which the grown run retraces the small one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megagrow.errors import GrowthError
from megagrow.growth.operator import GrowthBlock
from megagrow.growth.optimizer_rules import Factors
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.matrices import Matrix, matrices


def exact_factors(tensor: LogicalTensor, small: Catalog, blocks: Sequence[GrowthBlock]) -> Factors:
    """The factors of a tensor of the grown model.

    AdamW moves a parameter by lr * m / (sqrt(v) + eps) + lr * wd * p.  With m -> g m and v -> g^2 v
    the quotient is unchanged if eps -> g eps; the block's rate r then requires lr -> r lr, and wd
    -> wd / r keeps the decay unchanged.

    Raises:
        GrowthError: no single rate retraces the small run, or no gradient is stated.
    """
    pairs = {(b.param if b.rate is None else b.rate, b.grad) for b in blocks}
    if len(pairs) != 1:
        raise GrowthError(
            f"state policy 'exact': the blocks of {tensor.name} differ in their coefficients, "
            "so no one learning rate retraces the small run",
            fix="set grow.state_policy to sparkling or reset",
        )
    rate, grad = pairs.pop()
    if grad is None:
        raise GrowthError(f"state policy 'exact': no gradient is stated for {tensor.name}")
    return Factors(
        lr=abs(rate),
        weight_decay=1.0 / abs(rate),
        eps=abs(grad),
        orthogonal=_orthogonal_factor(tensor, small[blocks[0].source], blocks, abs(rate)),
    )


def _orthogonal_factor(
    tensor: LogicalTensor, old: LogicalTensor, blocks: Sequence[GrowthBlock], rate: float
) -> float | None:
    """Muon moves a matrix M by lr * scale * NS(M / |M|), NS an odd polynomial.

    Let the grown momentum be g P m Q^T, where P and Q copy every row a and every column b times:
    P^T P = a, Q^T Q = b.  Then NS of it is P NS(m / |m|) Q^T / sqrt(a b), whatever g.  The block's
    rate r therefore requires lr -> r sqrt(a b) (old scale / new scale) lr.

    Returns:
        The factor; None if rows or columns are not copied equally often, or if the matrices of a
        fused tensor need different factors.
    """
    if not tensor.is_matrix:
        return 1.0
    pairs = list(zip(matrices(tensor), matrices(old), strict=True))
    factors = []
    for new, before in pairs:
        copies = _copies(new, before, blocks)
        if copies is None:
            return None
        factors.append(rate * math.sqrt(copies) * (before.scale / new.scale))
    return factors[0] if max(factors) - min(factors) <= 1e-12 * max(factors) else None


def _copies(new: Matrix, old: Matrix, blocks: Sequence[GrowthBlock]) -> int | None:
    """How often each row and column of a matrix is copied; None if not all equally often."""
    meeting = []  # for each block, its extent on each axis of the matrix
    for block in blocks:
        axes = []
        for axis, part, before in zip(block.axes, new.index, old.index, strict=True):
            low, high = axis.from_target(part.start, part.stop)
            source = axis.source_start + low * axis.source_step
            target = axis.target_start + low * axis.target_step
            whole = source == before.start and high - low == before.stop - before.start
            axes.append((target, axis.target_step, whole) if high > low else None)
        if None not in axes:
            meeting.append(axes)
    if not all(axis and axis[2] for axes in meeting for axis in axes):
        return None
    # Every combination of the copies along each axis must be present, as in P m Q^T.
    copies = math.prod(len({axes[i] for axes in meeting}) for i in range(len(old.index)))
    return copies if copies == len(meeting) else None
