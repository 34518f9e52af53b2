"""Build DeepSpeed's configuration from ours; pass-through keys must not conflict with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megagrow.config import Config
from megagrow.config.batch import accumulation
from megagrow.engine.precision import precision_settings, require_own_formats
from megagrow.errors import ConfigError
from megagrow.state.layout import Layout

# Elements. DeepSpeed allocates buckets of this size; its default of 5e8 is 2 GB in fp32.
_BUCKET = 50_000_000


def deepspeed_config(
    config: Config, layout: Layout, *, parameters: int, sequence_parallel: bool = False
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        config: the run.
        layout: the process grid of this growth stage.
        parameters: number of trained parameters on one rank before ZeRO, which bounds the
            buckets.
        sequence_parallel: whether activations differ between tensor-parallel ranks.

    Raises:
        ConfigError: a key under `deepspeed` that megagrow sets itself, with another value, or
            one that would change a number format.
    """
    engine_clips = layout.zero == 0 and config.precision.dtype == "fp32"
    bucket = max(2, min(_BUCKET, parameters + parameters % 2))
    ours: dict[str, Any] = {
        "train_batch_size": config.batch.global_,
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": accumulation(config.batch, layout),
        # In fp32 at ZeRO 0 DeepSpeed clips but does not report the norm, so the engine clips.
        "gradient_clipping": 0.0 if engine_clips else config.optimizer.grad_clip,
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
    if sequence_parallel and layout.pipeline > 1:
        # DeepSpeed sends only a slice of the activations from each tensor-parallel rank, assuming
        # that all hold the same; with sequence parallelism each rank holds different ones.
        ours["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    require_own_formats(config.deepspeed)
    ours |= precision_settings(config, layout)
    if config.optimizer.offload == "cpu":
        _require_sharded_state(layout)
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # Our optimizer also steps CPU tensors, so DeepSpeed's CPU Adam is not needed.
        ours["zero_force_ds_cpu_optimizer"] = False
    return _merge(ours, config.deepspeed, "deepspeed")


def _require_sharded_state(layout: Layout) -> None:
    if layout.zero == 0:
        raise ConfigError(
            "optimizer.offload: DeepSpeed offloads sharded optimizer state only",
            found="layout.zero = 0",
            expected="layout.zero of 1, 2 or 3",
            fix="set layout.zero=1, or optimizer.offload=none",
        )


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
                fix=f"remove {where}, and use megagrow's own setting "
                "(layout, batch or optimizer) for it",
            )
    return merged
