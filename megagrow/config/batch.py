"""How a global batch divides into micro-batches."""

from __future__ import annotations

from megagrow.config import BatchConfig
from megagrow.errors import ConfigError
from megagrow.state.layout import Layout


def accumulation(batch: BatchConfig, layout: Layout) -> int:
    """Gradient-accumulation steps: micro-batches per optimizer step of one data-parallel rank.

    Raises:
        ConfigError: the global batch is not a multiple of micro-batch times data-parallel size.
    """
    unit = batch.micro * layout.data
    steps, rest = divmod(batch.global_, unit)
    if rest or steps == 0:
        near = max(1, round(batch.global_ / unit)) * unit
        raise ConfigError(
            "batch.global does not divide into micro-batches",
            found=f"batch.global = {batch.global_}, batch.micro = {batch.micro}, "
            f"data-parallel size = {layout.data}",
            expected=f"a multiple of batch.micro * data-parallel size = {unit}",
            fix=f"set batch.global={near}, or another batch.micro or number of processes",
        )
    return steps
