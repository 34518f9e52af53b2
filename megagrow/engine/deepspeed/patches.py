"""Start a DeepSpeed engine whose state is filled in later.

DeepSpeed expects an initialised model: it broadcasts rank 0's parameters and flattens them into
its own buffers.  Ours are filled by a transfer afterwards, so until then the parameters share
one small buffer, nothing is broadcast, and there is never a second copy of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn


def poison(parameters: Iterable[nn.Parameter], *, shared: bool) -> None:
    """Fill parameters with NaN, so that anything a transfer fails to write stops the run at once.

    Args:
        parameters: all of one dtype and device.
        shared: whether they may share one buffer, as large as the largest of them, because
            DeepSpeed will copy each into its own memory.
    """
    every = list(parameters)
    if not shared:
        for parameter in every:
            parameter.data.fill_(torch.nan)
        return
    first = every[0]
    memory = first.data.new_full((max(p.numel() for p in every),), torch.nan)
    for parameter in every:
        parameter.data = memory[: parameter.numel()].view(parameter.shape)


@contextlib.contextmanager
def lean_start() -> Iterator[None]:
    """Engines created here broadcast no parameters, allocate no dummy gradients, print nothing."""

    def partition(init: Any, parameter: Any) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    original = DeepSpeedZeroOptimizer.initialize_optimizer_states

    def make_gradients(optimizer: Any) -> None:
        # Without offload they are allocated, and freed at once.
        if optimizer.cpu_offload:
            original(optimizer)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (DeepSpeedEngine, "_broadcast_model", lambda engine: None),
            (Init, "_zero_init_param", partition),
            (DeepSpeedZeroOptimizer, "initialize_optimizer_states", make_gradients),
            # It prints, and first collects garbage, twice for each parameter group.
            (bf16_optimizer, "see_memory_usage", lambda message, force=False: None),
        ):
            stack.enter_context(replaced(owner, name, value))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Temporarily replace an attribute of one of DeepSpeed's modules or classes."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
