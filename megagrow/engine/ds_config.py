"""DeepSpeed's configuration, made from ours; what a user passes through may not clash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megagrow.config import Config
from megagrow.errors import ConfigError
from megagrow.layout import Layout
from megagrow.schedule.batch import accumulation

# Elements. DeepSpeed allocates buckets of this size; its default of 5e8 is 2 GB in fp32.
_BUCKET = 50_000_000


def deepspeed_config(config: Config, layout: Layout, *, parameters: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        config: the run.
        layout: the process grid of this growth stage.
        parameters: number of parameters on one rank before ZeRO, which bounds the buckets.

    Raises:
        ConfigError: a key under `deepspeed` that megagrow sets itself, with another value.
    """
    bucket = max(2, min(_BUCKET, parameters + parameters % 2))
    ours: dict[str, Any] = {
        "train_batch_size": config.batch.global_,
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": accumulation(config.batch, layout),
        # At ZeRO 0 DeepSpeed clips but does not tell the norm, so the engine does it itself.
        "gradient_clipping": config.optimizer.grad_clip if layout.zero else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": layout.zero,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    return _merge(ours, config.deepspeed, "deepspeed")


def _merge(ours: Mapping[str, Any], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        where = f"{path}.{key}"
        if key not in ours:
            merged[key] = value
        elif isinstance(ours[key], Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(ours[key], value, where)
        elif ours[key] != value:
            raise ConfigError(
                f"{where}: megagrow sets this itself",
                found=value,
                expected=ours[key],
                mend=f"remove {where}, and use megagrow's own setting "
                "(layout, batch or optimizer) for it",
            )
    return merged
