"""What a growth touches beyond plain pre-norm transformers, and which operators have rules for it.

An operator lists in `Operator.handles` the features that its formulas cover; any other growth that
touches one is refused before anything is read. So are layers that would change their kind, and
blocks that reach outside their tensors, which is a defect of an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import Feature, GrowthBlock, Operator
from megagrow.state.catalog import Catalog, LogicalTensor

_WORDS: dict[Feature, str] = {
    "norm after": "a wider residual stream behind norms of what the blocks write to it",
    "norm of all heads": "more heads under one norm of all queries and one of all keys",
    "head features": "wider heads under norms of each head, a scale of their own, or positions "
    "that turn a part of their features",
    "scaled embedding": "a wider stream with embeddings times the square root of its width",
}


def touched(model: ModelConfig, grown: ModelConfig) -> list[Feature]:
    """The features that the growth of one model to another depends on."""
    made = model.architecture
    found: list[Feature] = []
    wider = grown.hidden != model.hidden
    more_heads = (grown.heads, grown.kv_groups) != (model.heads, model.kv_groups)
    if wider and made.block_norms != "before":
        found.append("norm after")
    if more_heads and made.head_norm == "all":
        found.append("norm of all heads")
    fixed = made.head_norm or model.attention_scale or model.rope_fraction != 1.0
    if grown.head_dim != model.head_dim and fixed:
        found.append("head features")
    if wider and made.scaled_embedding:
        found.append("scaled embedding")
    return found


def refusal(operator: Operator, model: ModelConfig, grown: ModelConfig) -> GrowthError | None:
    """Why an operator cannot grow one model to another, or None if it can."""
    lacking = [feature for feature in touched(model, grown) if feature not in operator.handles]
    if not lacking:
        return None
    return GrowthError(
        f"grow.operator: {operator.name} has no rule for {_WORDS[lacking[0]]}",
        found=f"family {model.family}",
        fix="choose an operator that has (docs/growth-operators.md), or grow other sizes",
    )


def check_growth(
    operator: str,
    small: Catalog,
    target: Catalog,
    blocks: Callable[[LogicalTensor], Sequence[GrowthBlock]],
) -> None:
    """Check the blocks of a growth against both catalogs.

    Raises:
        GrowthError: a tensor of unknown role, a block outside its tensors, or a layer of another
            kind than its source.
    """
    unknown = [tensor.name for tensor in target if tensor.role == "other"]
    if unknown:
        raise GrowthError(
            f"grow.operator: no operator knows what {unknown[0]} is in its model",
            found=f"{len(unknown)} tensors with the role `other`",
            fix="state their roles in the catalog of the family",
        )
    for tensor in target:
        require_inside(operator, tensor, small, blocks(tensor))
    require_layer_kinds(small, target, blocks)


def require_layer_kinds(
    small: Catalog, target: Catalog, blocks: Callable[[LogicalTensor], Sequence[GrowthBlock]]
) -> None:
    """Check that every layer is built from layers of its own kind.

    Args:
        small, target: the catalogs before and after.
        blocks: the blocks of each tensor of the target.

    Raises:
        GrowthError: a layer with a window, say, would be a copy of one without.
    """
    for tensor in target:
        for block in blocks(tensor):
            source = small[block.source]
            if source.layer is None or source.kind == tensor.kind:
                continue
            period = target.period
            raise GrowthError(
                f"grow.operator: layer {tensor.layer} would come from layer {source.layer}, which "
                "attends in another way",
                found=f"{source.kind or 'all layers alike'}, and {tensor.kind or 'all alike'} in "
                "the grown model",
                expected="the same kind of layer",
                fix=f"grow from a multiple of {period} layers to another, or use depth_slices with "
                "sources of the same kind",
            )


def require_inside(
    operator: str, tensor: LogicalTensor, small: Catalog, blocks: Sequence[GrowthBlock]
) -> None:
    """Check that an operator's blocks fit its own target: a defect is found before any copy.

    Raises:
        GrowthError: a block reaches outside the tensor, or outside its source.
    """
    for block in blocks:
        source = small[block.source]
        for axis, n, m in zip(block.axes, tensor.shape, source.shape, strict=True):
            last_target = axis.target_start + (axis.length - 1) * axis.target_step
            last_source = axis.source_start + (axis.length - 1) * axis.source_step
            if not (last_target < n and last_source < m):
                raise GrowthError(
                    f"operator {operator}: a block of {tensor.name} reaches outside "
                    f"{list(tensor.shape)}"
                )
