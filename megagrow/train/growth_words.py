"""An offline growth in words, for `launch/grow.py`."""

from __future__ import annotations

from typing import Any, cast

from megagrow.config.growths import SIZES
from megagrow.models.registry import family_of
from megagrow.train.grow_offline import OfflineGrowth, WeightsGrowth


def describe_sizes(plan: OfflineGrowth | WeightsGrowth) -> list[str]:
    """The growth's effect on the model's sizes, and which sizes it leaves alone."""
    small, model, changed, left = plan.small, plan.model, [], []
    for setting in SIZES:
        before, after = small.effective(setting), model.effective(setting)
        if before != after:
            changed.append(f"{setting} {before} -> {after}")
        elif setting in plan.growth.operator.sizes:
            left.append(f"{setting} {before}")
    if small.tie_embeddings != model.tie_embeddings:
        changed.append("tie_embeddings true -> false")
    lines = [", ".join(changed) + (f"; {', '.join(left)} as before" if left else "")]
    stored = family_of(model).huggingface
    refusal = None if stored is None else stored.refusal(model)
    if refusal is not None:
        lines.append(f"{refusal[0]}, so it cannot be exported (found: {refusal[1]})")
    return lines


def stages_to_go_on(plan: OfflineGrowth) -> list[dict[str, Any]]:
    """The `stages` section of a configuration that resumes from the grown checkpoint."""
    stages = plan.config.model_dump(mode="json", by_alias=True, exclude_none=True)["stages"]
    return cast(list[dict[str, Any]], stages[: plan.state.growth_stage + 1])
