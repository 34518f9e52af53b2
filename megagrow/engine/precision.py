"""The number formats that a run computes in, as its DeepSpeed configuration implies them.

The DeepSpeed configuration, the dry run and the log all use this one rule, so they cannot
disagree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megagrow.config import Config
from megagrow.config.batch import accumulation
from megagrow.errors import ConfigError
from megagrow.state.layout import Layout
from megagrow.state.optimizers import OptimizerKind

# These would override formats that only `precision` may set.
_REFUSED = (
    ("torch_autocast", "enabled"),
    ("amp", "enabled"),
    ("bf16", "bf16_master_weights_and_grads"),
    ("bf16", "bf16_optimizer_states"),
    ("fp16", "auto_cast"),
    ("fp16", "fp16_master_weights_and_grads"),
    ("data_types", "param_dtype"),
)


@dataclass(frozen=True)
class Precisions:
    """The number formats of one growth stage.

    Attributes:
        compute: of parameters, activations and matrix products.
        accumulation: of the sum of gradients over micro-batches.
        reduction: of the sum of gradients over data-parallel ranks.
        state: of master weights, optimizer state and the update.
        newton_schulz: of Muon's iteration; None for other optimizers.
        micro_batches: how many gradients are summed on a rank in a step.
    """

    compute: str
    accumulation: str
    reduction: str
    state: str
    newton_schulz: str | None
    micro_batches: int

    def __str__(self) -> str:
        formats = {
            "matrix products": self.compute,
            "gradients summed over micro-batches": self.accumulation,
            "over data ranks": self.reduction,
            "master weights and moments": self.state,
        }
        if self.newton_schulz is not None:
            formats["Newton-Schulz"] = self.newton_schulz
        return ", ".join(f"{what} {name}" for what, name in formats.items())

    @property
    def caveat(self) -> str | None:
        """What summing many gradients in 16 bit loses; None if the run does no such sum."""
        if self.accumulation == "fp32" or self.micro_batches == 1:
            return None
        return (
            f"sums {self.micro_batches} gradients in {self.accumulation}, which drops "
            "small terms; layout.zero=1 without optimizer.offload sums in fp32"
        )


def precision_settings(config: Config, layout: Layout) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that decides the number formats.

    Gradients of 16-bit models are summed in fp32 wherever DeepSpeed 0.19.8 can: over data ranks
    always; over micro-batches not at ZeRO 0, which it rejects, and not with offload at ZeRO 1 and
    2, where it passes the sum through a 16-bit buffer.  Settings for either sum in
    `config.deepspeed` take precedence.
    """
    precision = config.precision
    if precision.dtype == "fp32":
        return {}
    settings: dict[str, Any] = {}
    if precision.dtype == "bf16":
        # This would check every parameter's gradient separately, in half a dozen kernels; the
        # global norm shows it as well, and the engine skips steps whose norm is not finite.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
    else:
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.window,
        }
    if "data_types" not in config.deepspeed and _sums_in_fp32(config, layout):
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if precision.dtype == "bf16" and layout.zero == 1:
            # Add each gradient to the fp32 sum as soon as it is ready; do not also keep it in bf16.
            settings["bf16"]["immediate_grad_update"] = True
    if "communication_data_type" not in config.deepspeed:
        settings["communication_data_type"] = "fp32"
    return settings


def _sums_in_fp32(config: Config, layout: Layout) -> bool:
    """Whether micro-batches are summed at all, and DeepSpeed can do it in fp32."""
    offloads_whole_sums = config.optimizer.offload == "cpu" and layout.zero < 3
    several = accumulation(config.batch, layout) > 1
    return several and layout.zero > 0 and not offloads_whole_sums


def precisions(settings: Mapping[str, Any], *, optimizer: OptimizerKind, gpu: bool) -> Precisions:
    """The formats in which an engine with these settings computes.

    Args:
        settings: the full configuration for `deepspeed.initialize`.
        optimizer: the iteration of one that orthogonalises has a format of its own.
        gpu: whether the model is on a GPU.
    """
    enabled = [name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled")]
    compute = enabled[0] if enabled else "fp32"
    summed = settings.get("data_types", {}).get("grad_accum_dtype") or compute
    return Precisions(
        compute=compute,
        accumulation=summed,
        reduction=settings.get("communication_data_type") or compute,
        state="fp32",
        newton_schulz=newton_schulz_format(compute, gpu=gpu) if optimizer.orthogonal else None,
        micro_batches=settings["gradient_accumulation_steps"],
    )


def newton_schulz_format(compute: str, *, gpu: bool) -> str:
    """The format of Muon's iteration: fp16 for 16-bit models on a GPU, otherwise fp32.

    DeepSpeed uses fp16 wherever the processor supports it, even in fp32 runs, whose updates are
    then off by 2e-2 instead of 4e-6; and the same run would differ between CPUs with and without
    fp16.
    """
    return "fp16" if gpu and compute != "fp32" else "fp32"


def on_gpu() -> bool:
    """Whether a job on this machine trains on GPUs."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def require_own_formats(given: Mapping[str, Any]) -> None:
    """Reject pass-through DeepSpeed settings that change a format which `precision` sets.

    Raises:
        ConfigError: there is one.
    """
    for section, key in _REFUSED:
        inside = given.get(section)
        if isinstance(inside, Mapping) and inside.get(key):
            raise ConfigError(
                f"deepspeed.{section}.{key}: number formats are set by precision.dtype alone",
                found=inside[key],
                fix=f"remove deepspeed.{section}.{key}; set precision.dtype to fp32, bf16 or fp16",
            )
