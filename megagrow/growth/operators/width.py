"""Width growth: more units in every layer, the same function.

All operators here duplicate units. With h the residual stream, the grown stream is k copies [h, h,
...]; heads and ffn units are duplicated likewise. A matrix that reads a duplicated axis must weight
the copies with shares that sum to 1, so that each unit receives the same input as before; the
operators differ in the shares:

    width          equal shares: every matrix is [[W, W], [W, W]] / k
    width_diag     copy i reads copy i alone: [[W, 0], [0, W]]
    width_split    unequal shares 1 : 2 : ... : k
    width_noise    equal shares and noise that cancels in the sum
    width_perturb  equal shares and noise that does not, so the function changes

Embeddings, norms and biases are repeated; the shares of the output head are applied in the final
norm, so that a tied head needs no change. The statistics of LayerNorm and RMSNorm do not change.

Gradients. A matrix that reads copy j with share a_j sends a_j times the old gradient back to it, if
the gradients of its own copies sum to the old one; by induction from the head downwards they do. In
the stream this holds for each copy only if shares are equal: a norm's backward pass mixes all its
inputs.

Each axis may grow by its own factor, except head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from megagrow.errors import GrowthError
from megagrow.growth.operator import (
    GrowthBlock,
    Operator,
    growth_factor,
    repeated,
    require_same,
    same,
    tiled,
)
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.roles import FINAL_NORM, NORMS
from megagrow.transfer.state_map import AxisMap, Noise, Statistic

GROWING = ("embed", "kv_group", "query", "ffn")
WIDTH_SIZES = ("hidden", "heads", "kv_heads", "ffn")


@dataclass(frozen=True)
class _Duplicate:
    """One block of copies: the index of the copy (and their number) along each growing axis."""

    axes: tuple[AxisMap, ...]
    copy: dict[str, tuple[int, int]]


def duplicates(tensor: LogicalTensor, old: LogicalTensor) -> list[_Duplicate]:
    """All blocks of a tensor whose units are duplicated; the old block comes first.

    If only query heads are duplicated, keys and values have separate blocks.

    Raises:
        GrowthError: an axis does not grow by an integer factor.
    """
    parts: list[list[tuple[AxisMap, dict[str, tuple[int, int]]]]] = []
    for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
        if meaning == "projection":
            parts.append(_projections(tensor.name, n, large))
            continue
        if meaning not in GROWING:
            require_same(tensor.name, meaning, n, large)
            parts.append([(same(n), {})])
            continue
        k = growth_factor(large, n, f"{tensor.name}, axis {meaning}")
        maps = copies_along(meaning, n, k)
        parts.append([(axis, {meaning: (c, k)}) for c, axis in enumerate(maps)])
    blocks = []
    for choice in product(*parts):
        copy: dict[str, tuple[int, int]] = {}
        for _, entry in choice:
            copy |= entry
        blocks.append(_Duplicate(tuple(axis for axis, _ in choice), copy))
    return blocks


def copies_along(meaning: str, n: int, k: int) -> list[AxisMap]:
    """The indices of the k copies of n units, the old ones first in the list."""
    # The residual stream is one vector shared by all layers, so its copies are laid end to end;
    # heads and ffn units may be permuted within each layer, so their copies follow their source.
    if meaning == "embed":
        return tiled(n, k)
    # Inside a key/value group the old ones come last: next to the group's key and value.
    return tiled(n, k)[::-1] if meaning == "query" else repeated(n, k)


def _projections(name: str, n: int, large: int) -> list[tuple[AxisMap, dict[str, tuple[int, int]]]]:
    """The projections of a key/value group: its queries, then one key and one value."""
    if n == large:
        return [(same(n), {})]
    queries, k = n - 2, growth_factor(large - 2, n - 2, f"{name}, queries of a group")
    shared = AxisMap(k * queries, 1, queries, 1, 2)
    copies = [(axis, {"query": (c, k)}) for c, axis in enumerate(copies_along("query", queries, k))]
    return [*copies, (shared, {})]


def equal_shares(tensor: LogicalTensor, block: _Duplicate) -> tuple[float, float]:
    """(param, grad) of a block if every copy is read with the same share."""
    inputs = tensor.reads
    share = math.prod(1 / k for axis, (_, k) in block.copy.items() if axis in inputs)
    others = math.prod(1 / k for axis, (_, k) in block.copy.items() if axis not in inputs)
    if tensor.role in FINAL_NORM:
        return others, 1.0
    if tensor.role == "head":
        return 1.0, share
    return share, others


def is_new(block: _Duplicate) -> bool:
    """Whether any of its copies is other than the first."""
    return any(c > 0 for c, _ in block.copy.values())


@dataclass(frozen=True, kw_only=True)
class Width(Operator):
    """Tile every matrix; heads, hidden and ffn grow by the factor, head_dim is unchanged."""

    def interchangeable(self, small: Catalog, target: Catalog) -> bool:
        """True: all copies read and write the same."""
        return True

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """All copies of all grown axes."""
        blocks = []
        for block in duplicates(tensor, small[tensor.name]):
            param, grad = equal_shares(tensor, block)
            blocks.append(
                GrowthBlock(tensor.name, block.axes, param=param, grad=grad, new=is_new(block))
            )
        return tuple(blocks)


WIDTH = Width(
    name="width",
    summary="every matrix [[W, W], [W, W]] / k; heads, hidden and ffn by k",
    keeps="loss",
    breaker="sparkling, kept: old and new blocks differ in moments and step count",
    source="HyperCloning, arXiv 2409.12903; SPARKLING, arXiv 2602.02472",
    policies=("sparkling", "exact", "shen", "kept", "copy", "reset"),
    sizes=WIDTH_SIZES,
    handles=frozenset({"norm after", "norm of all heads"}),
)


@dataclass(frozen=True, kw_only=True)
class WidthDiagonal(Operator):
    """Block-diagonal matrices; all axes by the same factor."""

    def interchangeable(self, small: Catalog, target: Catalog) -> bool:
        """True: each reads its own copy, and all of these are equal."""
        return True

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """All copies; off-diagonal blocks start at 0, but have the same gradient as the others."""
        blocks = []
        for block in duplicates(tensor, small[tensor.name]):
            share, grad = equal_shares(tensor, block)
            new = is_new(block)
            param = float(_pairs(tensor, block)) if tensor.is_matrix else share
            blocks.append(GrowthBlock(tensor.name, block.axes, param, grad, new=new, rate=share))
        return tuple(blocks)


WIDTH_DIAG = WidthDiagonal(
    name="width_diag",
    summary="every matrix [[W, 0], [0, W]]; heads, hidden and ffn by k",
    keeps="loss",
    breaker="sparkling: as width; shen leaves the copies interchangeable, hence twins",
    source="Shen et al., arXiv 2203.06211",
    policies=("shen", "exact", "sparkling", "kept", "reset"),
    sizes=WIDTH_SIZES,
    handles=frozenset({"norm after", "norm of all heads"}),
)


def _pairs(tensor: LogicalTensor, block: _Duplicate) -> bool:
    """Whether a block of a matrix has copy i read copy i."""
    inputs = tensor.reads
    growing = {axis: copy for axis, copy in block.copy.items() if copy[1] > 1}
    read = [copy for axis, copy in growing.items() if axis in inputs]
    written = [copy for axis, copy in growing.items() if axis not in inputs]
    if len(read) > 1 or [k for _, k in read] != [k for _, k in written]:
        factors = ", ".join(f"{axis} by {k}" for axis, (_, k) in growing.items())
        raise GrowthError(
            f"{tensor.name}: copy i cannot read copy i alone, its axes grow unevenly: {factors}",
            expected="one factor for hidden, heads, kv_heads and ffn",
            fix="set grow.operator to width, which takes a factor for each axis",
        )
    return read == written


@dataclass(frozen=True, kw_only=True)
class WidthSplit(Operator):
    """Tile with unequal shares, 1 : 2 : ... : k."""

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """All copies of all grown axes."""
        inputs = tensor.reads
        blocks = []
        for block in duplicates(tensor, small[tensor.name]):
            share = {axis: 2 * (c + 1) / (k * (k + 1)) for axis, (c, k) in block.copy.items()}
            param = math.prod(s for axis, s in share.items() if axis in inputs)
            others = {axis: s for axis, s in share.items() if axis not in inputs}
            grad: float | None = math.prod(others.values())
            if tensor.role in FINAL_NORM:
                param, grad = math.prod(others.values()), 1.0
            elif tensor.role == "head":
                param, grad = 1.0, param
            elif "embed" in others and tensor.role not in NORMS:
                grad = None if block.copy["embed"][1] > 1 else grad
            blocks.append(
                GrowthBlock(tensor.name, block.axes, param=param, grad=grad, new=is_new(block))
            )
        return tuple(blocks)


WIDTH_SPLIT = WidthSplit(
    name="width_split",
    summary="copies read with unequal shares 1 : 2 : ... : k that sum to 1",
    keeps="loss",
    breaker="unequal shares part the stream's copies; the state policy parts the others",
    source="LEMON, arXiv 2310.07999; SPARKLING, arXiv 2602.02472 (uneven 1:2)",
    policies=("sparkling", "kept", "copy", "reset"),
    sizes=WIDTH_SIZES,
    handles=frozenset({"norm of all heads"}),
)


@dataclass(frozen=True, kw_only=True)
class WidthNoise(Operator):
    """Tile, plus noise on the copies of an input that sums to 0 over them.

    Attributes:
        noise: its standard deviation, in units of the root mean square of the scaled copy: with 1
            it is as large as the values that it is added to.
    """

    noise: float = 1.0

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """All copies of all grown axes; copies on input axes carry the noise."""
        inputs, old = tensor.reads, small[tensor.name]
        head = tensor.role == "head"
        blocks = []
        for block in duplicates(tensor, old):
            param, grad = equal_shares(tensor, block)
            number, count, written = 0, 1, ""
            for axis, (c, k) in block.copy.items():
                if axis in inputs:
                    number, count = number * k + c, count * k
                else:
                    written += f" {axis} {c}"
            noise = None
            if count > 1 and not head:
                std = self.noise * param * _alternating(number, count)
                noise = own_noise(f"{tensor.name} {list(tensor.shape)}{written}", std, old)
            stated = grad if head or tensor.role in FINAL_NORM else None
            new = is_new(block)
            blocks.append(GrowthBlock(tensor.name, block.axes, param, stated, new=new, noise=noise))
        return tuple(blocks)


def own_noise(name: str, std: float, old: LogicalTensor) -> Noise | None:
    """Noise in units of the source tensor's own root mean square; None if it is 0."""
    return Noise(name, std, Statistic(old.name, old.shape, "rms")) if std else None


WIDTH_NOISE = WidthNoise(
    name="width_noise",
    summary="width plus noise that cancels over the copies of an input: [+e, -e]",
    keeps="loss",
    breaker="the noise does not cancel in the backward pass",
    source="HyperCloning, arXiv 2409.12903 (symmetric expansion with noise)",
    policies=("sparkling", "kept", "copy", "reset"),
    sizes=WIDTH_SIZES,
    settings=("noise",),
    handles=frozenset({"norm after", "norm of all heads"}),
)


@dataclass(frozen=True, kw_only=True)
class WidthPerturb(Operator):
    """Tile, plus independent noise in every copy of a matrix: W' = (tile(W) + noise) / k.

    Attributes:
        noise: as in `WidthNoise`.
    """

    noise: float = 1.0

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """All copies of all grown axes; in matrices all of them carry noise, the first included."""
        old = small[tensor.name]
        found = duplicates(tensor, old)
        blocks = []
        for number, block in enumerate(found):
            param, _ = equal_shares(tensor, block)
            noise = None
            if tensor.is_matrix and len(found) > 1:
                name = f"{tensor.name} {list(tensor.shape)} copy {number}"
                noise = own_noise(name, self.noise * param, old)
            blocks.append(
                GrowthBlock(tensor.name, block.axes, param, new=is_new(block), noise=noise)
            )
        return tuple(blocks)


WIDTH_PERTURB = WidthPerturb(
    name="width_perturb",
    summary="width plus noise that is independent in every copy of a matrix",
    keeps="nothing",
    breaker="the noise",
    source="Ma et al., arXiv 2602.10545; Net2Net, arXiv 1511.05641",
    policies=("sparkling", "kept", "copy", "reset"),
    sizes=WIDTH_SIZES,
    settings=("noise",),
    handles=frozenset({"norm after", "norm of all heads"}),
)


def _alternating(number: int, count: int) -> float:
    """The numbers 0 to count-1, normalised to sum 0 and mean square 1; no two are equal."""
    return (2 * number - (count - 1)) / math.sqrt((count**2 - 1) / 3)
