"""What a run is: the schema of a configuration file.

Every section is a frozen pydantic model that refuses unknown keys; checks
that need more than one key name them all.  The model is in `megagrow.config.model`, ends
of stages and growths are in `megagrow.config.growths`; loading files, overrides and presets is
`megagrow.config.load`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagrow.config.growths import GrowConfig, UntilConfig
from megagrow.config.model import ModelConfig
from megagrow.config.section import Fraction, PathText, Positive, Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class RunConfig(Section):
    """Where the run lives and its one seed."""

    dir: PathText = "runs/default"
    # Seconds to wait for another job that still has `dir`, before this one is refused.
    wait: Annotated[float, Field(ge=0)] = 90.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234


class LayoutConfig(Section):
    """How the model is spread; data parallel is world / (tensor * pipeline)."""

    tensor: Positive = 1
    pipeline: Positive = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    sequence_parallel: bool = False  # norms and dropout on 1/tensor of the sequence
    partition: Literal["parameters", "flops"] = "parameters"  # what pipeline stages balance

    @model_validator(mode="after")
    def _pipeline_needs_low_zero(self) -> LayoutConfig:
        if self.pipeline > 1 and self.zero > 1:
            raise ValueError(
                f"zero = {self.zero} does not go with pipeline = {self.pipeline}: DeepSpeed's "
                "pipeline engine takes ZeRO 0 or 1 only; set layout.zero=1 (optimizer state is "
                "then sharded all the same), or layout.pipeline=1 with layout.tensor raised"
            )
        return self


class DataConfig(Section):
    """The prepared dataset (see launch/prepare_data.py)."""

    path: PathText
    tokenizer: PathText | None = None  # default: the tokenizer inside `path`
    # Rank 0 reads all of the dataset while the job starts and compares its checksums, about a
    # second for a gigabyte; the first step waits for it.
    verify: bool = True


class OptimizerConfig(Section):
    """Weight decay is decoupled, and not applied to norms and biases.

    Lion wants a learning rate 3 to 10 times lower than AdamW, a weight decay as much higher,
    and betas of about [0.9, 0.99]; it has no use for eps.

    Muon orthogonalises the momentum of the blocks' matrices and is AdamW for all other tensors,
    which `betas` and `eps` are then for.  Matrices want a rate of their own, about 0.02; it
    follows the schedule of `lr`.
    """

    name: Literal["adamw", "lion", "muon"] = "adamw"
    lr: Rate = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NotNegative = 0.1
    grad_clip: NotNegative = 1.0  # 0 turns clipping off
    offload: Literal["none", "cpu"] = "none"  # where optimizer state lives (ZeRO 1 to 3)
    muon_lr: Rate | None = None  # of Muon's matrices; default: lr
    momentum: Beta = 0.95  # of Muon's matrices

    @model_validator(mode="after")
    def _settings_of_muon(self) -> OptimizerConfig:
        given = {"muon_lr", "momentum"} & self.model_fields_set
        if self.name != "muon" and any(
            getattr(self, key) != type(self).model_fields[key].default for key in given
        ):
            raise ValueError(
                f"{' and '.join(sorted(given))}: Muon's alone, but name = {self.name}; set "
                "optimizer.name=muon, or leave it out"
            )
        return self

    @property
    def bias_correction(self) -> tuple[float, float] | None:
        """The betas of moments that are corrected for their age; None where there are none."""
        return None if self.name == "lion" else self.betas

    def changed(self, by: StageOptimizerConfig | None) -> OptimizerConfig:
        """The settings of a stage, from those of the stage before it and what the stage names."""
        return self if by is None else self.model_copy(update=by.model_dump(exclude_none=True))


class StageOptimizerConfig(Section):
    """What a growth stage changes of the optimizer, from its first update on.

    A setting that it does not name stays as it is in the stage before.  `muon_lr` follows `lr`
    as long as no stage, and no section `optimizer`, names it.
    """

    lr: Rate | None = None
    betas: tuple[Beta, Beta] | None = None
    eps: Rate | None = None
    weight_decay: NotNegative | None = None
    grad_clip: NotNegative | None = None
    muon_lr: Rate | None = None
    momentum: Beta | None = None
    name: Any = Field(None, exclude=True)  # these two are there to be refused in words
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
    """Number format of parameters and activations; master weights and moments are fp32."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Dynamic loss scaling, for fp16 alone: it starts at 2**initial_scale_power, is halved when
    # gradients overflow (the step is then skipped) and doubled after `window` good steps.
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    window: Positive = 1000


class ScheduleConfig(Section):
    """Learning rate over the run; `decay` is the fraction of steps that WSD decays."""

    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup: Annotated[int, Field(ge=0)] | None = None  # steps; default: a tenth of the run, <= 100
    decay: Fraction = 0.1
    floor: Fraction = 0.0  # final learning rate as a fraction of the peak


class StageScheduleConfig(Section):
    """The learning rate of one growth stage, times what the run's schedule says.

    `warmup`: over so many steps from the stage's first on the rate climbs from 0.  `decay`: the
    fraction of the stage's own steps, its last ones, over which the rate falls in a straight
    line to `floor` (of the rate before; default: `schedule.floor`).  In the last stage it takes
    the place of `schedule.decay`.
    """

    warmup: Positive | None = None
    decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    floor: Fraction | None = None

    @model_validator(mode="after")
    def _floor_of_a_decay(self) -> StageScheduleConfig:
        if self.floor is not None and self.decay is None:
            raise ValueError("floor is where the stage's own decay ends: give decay as well")
        return self


class BatchConfig(Section):
    """Samples in one optimizer step, and in one forward pass of one rank."""

    global_: Positive = Field(alias="global")
    micro: Positive

    @model_validator(mode="after")
    def _micro_divides_global(self) -> BatchConfig:
        if self.global_ % self.micro:
            above = -(-self.global_ // self.micro) * self.micro
            raise ValueError(
                f"global = {self.global_} is not divisible by micro = {self.micro}; "
                f"set batch.global to a multiple of {self.micro}, for instance {above}"
            )
        return self


class StageConfig(Section):
    """A growth stage: its end, and what is new at its start.

    A growth, a layout, a batch, a sequence length of the samples (at most the model's), settings
    of the optimizer: what is not named stays.  Stages without a growth make a warm-up of batch or
    sequence length.  `schedule` is of the stage alone.
    """

    until: UntilConfig
    grow: GrowConfig | None = None
    layout: LayoutConfig | None = None
    batch: BatchConfig | None = None
    sequence: Positive | None = None
    optimizer: StageOptimizerConfig | None = None
    schedule: StageScheduleConfig | None = None


class WandbConfig(Section):
    """Where Weights & Biases keeps the run, in the words of its own library."""

    project: str
    name: str | None = None  # default: made up by Weights & Biases
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class AverageConfig(Section):
    """The mean of the weights over the last steps of a run, validated beside the last weights.

    `last` is the fraction of all steps, for instance a tenth of the decay.  The mean is kept in
    host memory, an fp32 copy of what each rank holds; checkpoints have the last weights.
    """

    last: Annotated[float, Field(gt=0.0, le=1.0)]


class TrainConfig(Section):
    """The loop: validation, logging, early stop."""

    validate_every: Positive = 100
    validation_samples: Positive = 64
    log_every: Positive = 10
    stop_after_steps: Positive | None = None
    # After a growth, every so many steps: how twins part, ranks, what new parameters learn, and the
    # mixing time.  Null: never.
    growth_diagnostics: Positive | None = None
    tensorboard: bool = True
    prometheus_port: Annotated[int, Field(gt=0, lt=65536)] | None = None  # of rank 0's host
    # Where it listens: this host alone by default; 0.0.0.0 lets anyone read who reaches the port.
    prometheus_address: str = "127.0.0.1"
    wandb: WandbConfig | None = None
    threads: Positive | None = None  # CPU threads a rank; default: cores / local ranks
    average: AverageConfig | None = None


class CheckpointConfig(Section):
    """When to save and how many to keep."""

    every: Positive = 500
    keep: Positive = 2
    # Write beside the steps that follow, from a copy of each rank's state in host memory.
    # Default: on GPUs, whose hosts have memory and cores to spare; not on CPUs.
    asynchronous: bool | None = None


class WatchConfig(Section):
    """How long a rank may make no progress before the job is ended, in seconds."""

    stall: Annotated[float, Field(gt=0)] = 60.0  # in training steps and validation
    slow: Annotated[float, Field(gt=0)] = 600.0  # while starting, growing and saving


class RecoveryConfig(Section):
    """What a run may do by itself about losses and gradients that are not finite, or spikes."""

    skip: Annotated[int, Field(ge=0)] = 3  # bad steps in a row that are left out
    rollback: Annotated[int, Field(ge=0)] = 1  # returns to the last checkpoint after that
    # A loss above this multiple of the recent median is bad as well; null: no such limit.
    spike: Annotated[float, Field(gt=1.0)] | None = None


class LawConfig(Section):
    """Constants of L(N, S) = floor + (n_scale / N)^n_power + (s_scale / S)^s_power."""

    floor: Annotated[float, Field(ge=0)]
    n_scale: Annotated[float, Field(gt=0)]
    n_power: Annotated[float, Field(gt=0)]
    s_scale: Annotated[float, Field(gt=0)]
    s_power: Annotated[float, Field(gt=0)]
    unit: Literal["steps", "tokens"] = "tokens"
    embeddings: bool = True  # whether N counts them


class OpsConfig(Section):
    """Who serves the fused ops on a GPU (MEGAGROW_KERNELS chooses among the own ones)."""

    # A library that is named must be installed, and passes a numerical check before it is used.
    backend: Literal["own", "apex", "transformer_engine", "liger"] = "own"


class GrowthConfig(Section):
    """Settings of growths: the transfer that carries one, and the rules that end a stage.

    `law` is what `planned` and `marginal` foretell by: a published law's name or constants, as
    launch/plan.py --fit prints them.  `points` is how many validations in a row `slope` is taken
    over, and the fewest that `marginal` fits.
    """

    staging_mib: Annotated[float, Field(gt=0, le=2**30)] = 64.0  # per rank, all buffers together
    law: Literal["kaplan", "chinchilla", "epoch"] | LawConfig = "chinchilla"
    points: Annotated[int, Field(ge=2)] = 5

    @property
    def staging_bytes(self) -> int:
        """`staging_mib` in bytes."""
        return int(self.staging_mib * 2**20)


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    growth: GrowthConfig = GrowthConfig()
    ops: OpsConfig = OpsConfig()
    watch: WatchConfig = WatchConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _the_last_stage_is_bounded(self) -> Config:
        until, last = self.stages[-1].until, len(self.stages) - 1
        if not until.bounded or until.rule not in (None, "slope"):
            raise ValueError(
                f"stages[{last}].until.{until.rule}: no growth follows the last stage; say where "
                "the run ends, for instance until: {tokens: 1e9}, alone or with a slope"
            )
        return self

    @model_validator(mode="after")
    def _first_stage_does_not_grow(self) -> Config:
        if self.stages[0].grow is not None:
            raise ValueError(
                "stages[0].grow: the first stage starts from fresh weights and cannot grow; "
                "describe the small model under `model` and move the growth to stages[1]"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_muon_in_stages(self) -> Config:
        for index, stage in enumerate(self.stages):
            given = stage.optimizer.model_dump(exclude_none=True) if stage.optimizer else {}
            of_muon = " and ".join(sorted(given.keys() & {"muon_lr", "momentum"}))
            if of_muon and self.optimizer.name != "muon":
                raise ValueError(
                    f"stages[{index}].optimizer: {of_muon}: Muon's alone, but optimizer.name = "
                    f"{self.optimizer.name}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _stages_have_the_schedule_they_ask_for(self) -> Config:
        for index, stage in enumerate(self.stages):
            key, asked = f"stages[{index}].schedule", stage.schedule or StageScheduleConfig()
            if index == 0 and asked.warmup is not None:
                raise ValueError(
                    f"{key}.warmup: the warm-up of the first stage is the run's; set "
                    "schedule.warmup, and leave it out here"
                )
            if asked.decay is not None and self.schedule.name in ("cosine", "linear"):
                raise ValueError(
                    f"{key}.decay: schedule.name = {self.schedule.name} falls by itself; set "
                    "schedule.name=wsd or constant, or leave it out"
                )
            if asked.decay is not None and stage.until.rule in ("slope", "marginal"):
                raise ValueError(
                    f"{key}.decay: until.{stage.until.rule} ends the stage at a step that is not "
                    "known before, so a decay into it cannot begin in time; bound the stage with "
                    "steps, tokens or flops alone, or leave the decay out"
                )
        return self
