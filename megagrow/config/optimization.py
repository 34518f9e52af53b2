"""The sections that say how parameters are updated: optimizer, precision, schedule, batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagrow.config.section import Fraction, Positive, Section
from megagrow.state.optimizers import OPTIMIZERS, OptimizerKind

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class OptimizerConfig(Section):
    """Optimizer settings. Weight decay is decoupled, and not applied to norms and biases.

    Lion needs a learning rate 3 to 10 times lower than AdamW, a weight decay higher by the same
    factor, and betas of about [0.9, 0.99]; it ignores eps.

    Muon orthogonalises the momentum of the blocks' matrices and is AdamW, with `betas` and `eps`,
    for all other tensors. Matrices need their own rate, about 0.02; it follows the schedule of
    `lr`.
    """

    name: Literal["adamw", "lion", "muon"] = "adamw"
    """The optimizer."""
    lr: Rate = 1e-3
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the moments."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of all parameters but norms and biases."""
    grad_clip: NotNegative = 1.0
    """Largest norm of the gradient over all parameters; 0 turns clipping off."""
    offload: Literal["none", "cpu"] = "none"
    """Where optimizer state is kept and updated; `cpu` needs ZeRO 1 to 3."""
    muon_lr: Rate | None = None
    """Peak rate of Muon's matrices; null: `lr`."""
    momentum: Beta = 0.95
    """Momentum of Muon's matrices."""

    @model_validator(mode="after")
    def _settings_of_muon(self) -> OptimizerConfig:
        given = {"muon_lr", "momentum"} & self.model_fields_set
        if not self.kind.orthogonal and any(
            getattr(self, key) != type(self).model_fields[key].default for key in given
        ):
            raise ValueError(
                f"{' and '.join(sorted(given))}: only for Muon, but name = {self.name}; set "
                "optimizer.name=muon, or leave it out"
            )
        return self

    @property
    def kind(self) -> OptimizerKind:
        """What is known about the optimizer."""
        return OPTIMIZERS[self.name]

    @property
    def bias_correction(self) -> tuple[float, float] | None:
        """The betas of bias-corrected moments, or None."""
        return self.betas if self.kind.bias_corrected else None

    def changed(self, by: StageOptimizerConfig | None) -> OptimizerConfig:
        """The settings of a stage: the previous stage's, with the ones that this stage changes."""
        return self if by is None else self.model_copy(update=by.model_dump(exclude_none=True))


class StageOptimizerConfig(Section):
    """Optimizer settings that a growth stage changes, from its first update on.

    Settings that are not given keep the value of the previous stage. `muon_lr` follows `lr` until a
    stage, or the section `optimizer`, sets it.
    """

    lr: Rate | None = None
    """Peak learning rate from this stage on."""
    betas: tuple[Beta, Beta] | None = None
    """Decay rates of the moments from this stage on."""
    eps: Rate | None = None
    """Added to the root of the second moment, from this stage on."""
    weight_decay: NotNegative | None = None
    """Weight decay from this stage on."""
    grad_clip: NotNegative | None = None
    """Largest norm of the gradient from this stage on; 0 turns clipping off."""
    muon_lr: Rate | None = None
    """Peak rate of Muon's matrices from this stage on."""
    momentum: Beta | None = None
    """Momentum of Muon's matrices from this stage on."""
    name: Any = Field(None, exclude=True)  # these two exist only for a clear error
    offload: Any = Field(None, exclude=True)

    @model_validator(mode="after")
    def _the_optimizer_stays(self) -> StageOptimizerConfig:
        fixed = [key for key in ("name", "offload") if key in self.model_fields_set]
        if fixed:
            raise ValueError(
                f"{' and '.join(fixed)} cannot change in a run, whose state is one optimizer's; "
                f"set {' and '.join(f'optimizer.{key}' for key in fixed)} for all of it"
            )
        return self


class PrecisionConfig(Section):
    """Precision of parameters and activations; master weights and moments are fp32."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format of parameters and activations; fp16 has dynamic loss scaling."""
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    """fp16 starts with a loss scale of 2 to this power; overflows halve it and skip the step."""
    window: Positive = 1000
    """Steps without overflow after which the loss scale is doubled."""


class ScheduleConfig(Section):
    """The learning-rate schedule, over all stages."""

    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """What follows the warm-up; `wsd` is warm-up, stable, decay (arXiv 2404.06395)."""
    warmup: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the rate rises from 0; null: a tenth of the run, at most 100."""
    decay: Fraction = 0.1
    """Final fraction of all steps over which `wsd` decays."""
    floor: Fraction = 0.0
    """Last learning rate as a fraction of the peak."""


class StageScheduleConfig(Section):
    """The learning-rate schedule of one growth stage, as factors on the run's schedule."""

    warmup: Positive | None = None
    """Steps, from the stage's first on, over which the rate rises from 0."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Final fraction of the stage's own steps over which the rate falls linearly to `floor`. In the
    last stage it replaces `schedule.decay`."""
    floor: Fraction | None = None
    """Where `decay` ends, relative to the rate before; null: `schedule.floor`."""

    @model_validator(mode="after")
    def _floor_of_a_decay(self) -> StageScheduleConfig:
        if self.floor is not None and self.decay is None:
            raise ValueError("floor is where the stage's own decay ends: give decay as well")
        return self


class BatchConfig(Section):
    """Samples per optimizer step, and per forward pass of one rank."""

    global_: Positive = Field(alias="global")
    """Samples of an optimizer step, over all ranks."""
    micro: Positive
    """Samples of one forward pass of a data-parallel rank; the rest is accumulated."""

    @model_validator(mode="after")
    def _micro_divides_global(self) -> BatchConfig:
        if self.global_ % self.micro:
            above = -(-self.global_ // self.micro) * self.micro
            raise ValueError(
                f"global = {self.global_} is not divisible by micro = {self.micro}; "
                f"set batch.global to a multiple of {self.micro}, for instance {above}"
            )
        return self
