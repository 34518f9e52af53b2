"""Growth of a single size: head width, heads, sequence length; `vocabulary` has the vocabulary.

Head width (`head_dim`).  Attention scores are q . k / sqrt(D), so the old query
features are scaled by sqrt(k) when D grows to k D.  Rotary positions rotate the pairs (i, i + D/2)
by theta^(-2i/D), so old feature d must go to index k d, which has the same frequency; anywhere else
it would rotate at another frequency.  New query features start at 0 and read copies of the old
keys; new value features are copies that the output projection does not read yet. So the function is
preserved and every new feature has a gradient, from the first or the second step on.

Heads (`kv_groups`).  Either query heads are duplicated inside each key/value group
(their outputs are read with weight 1/k), or key/value heads are duplicated and each copy serves a
part of the queries; both preserve the function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import (
    GrowthBlock,
    Operator,
    growth_factor,
    repeated,
    require_no_less,
    require_same,
    resized,
    same,
    unchanged,
)
from megagrow.growth.operators.width import duplicates, equal_shares, is_new
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap, Fill


@dataclass(frozen=True, kw_only=True)
class HeadDim(Operator):
    """Wider heads."""

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """Head width times the factor; hidden and heads stay."""
        return resized(model, {"head_dim": model.head_dim * factor})

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """Old features at indices 0, k, 2k, ...; copies of keys and values at the others."""
        old = small[tensor.name]
        if "head_dim" not in tensor.axes:
            return (GrowthBlock(tensor.name, unchanged(tensor, old), grad=1.0),)
        at = tensor.axes.index("head_dim")
        k = growth_factor(tensor.shape[at], old.shape[at], f"{tensor.name}, axis head_dim")
        slots = repeated(old.shape[at], k)

        def block(
            slot: int, param: float, grad: float, projection: AxisMap | None = None
        ) -> GrowthBlock:
            axes = []
            for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
                if meaning == "head_dim":
                    axes.append(slots[slot])
                    continue
                require_same(tensor.name, meaning, n, large)
                axes.append(projection if projection and meaning == "projection" else same(n))
            return GrowthBlock(tensor.name, tuple(axes), param, grad, new=slot > 0)

        if "head_dim" in tensor.reads:  # the output projection
            return tuple(block(i, float(i == 0), 1.0) for i in range(k))
        if "projection" not in tensor.axes:
            raise GrowthError(
                f"{tensor.name}: operator head_dim has no rule for a {tensor.role} of each feature",
                fix="grow another size",
            )
        queries = tensor.shape[tensor.axes.index("projection")] - 2
        query, shared = AxisMap(0, 1, 0, 1, queries), AxisMap(queries, 1, queries, 1, 2)
        return (
            block(0, math.sqrt(k), 1 / math.sqrt(k), query),
            *(block(i, 1.0, float(i == 0), shared) for i in range(k)),
        )


HEAD_DIM = HeadDim(
    name="head_dim",
    summary="wider heads: old features at the same rotary frequencies, new ones silent",
    keeps="loss",
    breaker="new query features and output columns start at 0, their partners do not",
    source="derived here for RoPE and the softmax scale",
    policies=("kept", "sparkling", "reset"),
    sizes=("head_dim",),
)


@dataclass(frozen=True, kw_only=True)
class KeyValueGroups(Operator):
    """More query heads per key/value head, or more key/value heads for the same query heads."""

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """Query heads times the factor; key/value heads are unchanged."""
        heads = {"heads": model.heads * factor, "kv_heads": model.kv_groups}
        return resized(model, heads)

    def interchangeable(self, small: Catalog, target: Catalog) -> bool:
        """True for duplicated query heads; split groups serve different queries."""
        return any(
            axis == "query" and large > small[tensor.name].shape[at]
            for tensor in target
            for at, (axis, large) in enumerate(zip(tensor.axes, tensor.shape, strict=True))
        )

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """Duplicates, or the old groups split into parts."""
        old = small[tensor.name]
        if "kv_group" not in tensor.axes:
            return (GrowthBlock(tensor.name, unchanged(tensor, old), grad=1.0),)
        axis = 1 if "projection" in tensor.axes else tensor.axes.index("query")
        extra = 2 if "projection" in tensor.axes else 0  # the group's key and value
        if tensor.shape[axis] >= old.shape[axis]:
            found = []
            for duplicate in duplicates(tensor, old):
                param, grad = equal_shares(tensor, duplicate)
                found.append(
                    GrowthBlock(tensor.name, duplicate.axes, param, grad, new=is_new(duplicate))
                )
            return tuple(found)
        return self._split(tensor, old, axis, extra)

    def _split(
        self, tensor: LogicalTensor, old: LogicalTensor, axis: int, extra: int
    ) -> tuple[GrowthBlock, ...]:
        group = tensor.axes.index("kv_group")
        groups, queries = old.shape[group], old.shape[axis] - extra
        part = tensor.shape[axis] - extra
        k = growth_factor(tensor.shape[group], groups, f"{tensor.name}, axis kv_group")
        if part * k != queries:
            raise GrowthError(
                f"{tensor.name}: the query heads of a group do not share out over {k} groups",
                found=f"{queries} query heads to a key/value head, {part} afterwards",
                expected="as many query heads in all as before, or a multiple in each group",
                fix="keep model.heads when grow.target raises kv_heads",
            )
        blocks = []
        for c, place in enumerate(repeated(groups, k)):
            rows: list[tuple[AxisMap, float | None, bool]]
            rows = [(AxisMap(0, 1, c * part, 1, part), 1.0, False)]
            if extra:
                # A key's gradient is the sum of its copies' gradients, in no fixed proportion.
                rows.append((AxisMap(part, 1, queries, 1, extra), None, c > 0))
            for row, grad, new in rows:
                axes = [same(n) for n in old.shape]
                axes[group], axes[axis] = place, row
                blocks.append(GrowthBlock(tensor.name, tuple(axes), grad=grad, new=new))
        return tuple(blocks)

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """Nothing is left uncovered."""
        return "covered"


KV_GROUPS = KeyValueGroups(
    name="kv_groups",
    summary="query heads duplicated inside their group, or key/value heads split up",
    keeps="loss",
    breaker="split key/value heads serve other queries; duplicates need the state policy",
    source="grouped-query attention, Ainslie et al., arXiv 2305.13245; derived here",
    policies=("copy", "kept", "sparkling", "reset"),
    sizes=("heads", "kv_heads"),
)


@dataclass(frozen=True, kw_only=True)
class MoreRows(Operator):
    """More tokens, or longer samples: old rows are kept, new ones are initialised.

    Attributes:
        axis: the axis of the rows.
        grad: the factor of the old rows' gradients; None if none is stated.
    """

    axis: str
    grad: float | None

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """The old rows."""
        old = small[tensor.name]
        for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
            if meaning == self.axis:
                require_no_less(tensor.name, meaning, n, large)
            else:
                require_same(tensor.name, meaning, n, large)
        return (GrowthBlock(tensor.name, tuple(same(n) for n in old.shape), grad=self.grad),)

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """New rows are initialised as at the start of a run."""
        return "fresh"


SEQUENCE = MoreRows(
    name="sequence",
    summary="longer samples: old positions stay, new ones fresh (RoPE: none to make)",
    keeps="loss",
    breaker="no copies are made",
    source="CompoundGrow, arXiv 2010.12562 (sequence length as a growth axis)",
    policies=("kept", "sparkling", "copy", "reset"),
    sizes=("sequence",),
    any_size=True,
    axis="position",
    grad=1.0,  # on samples of the old length nothing changes
)
