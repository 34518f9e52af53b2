"""The schema of a run's configuration file.

Every section is a frozen pydantic model that rejects unknown keys; checks across several keys name
them all. The model section is in `megagrow.config.model`, the ends of stages and growths are in
`megagrow.config.growths`; files and overrides are loaded by `megagrow.config.load`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagrow.config.data import DataConfig, StageDataConfig
from megagrow.config.growths import GrowConfig, Trained, UntilConfig
from megagrow.config.model import ModelConfig
from megagrow.config.section import Fraction, PathText, Positive, Section
from megagrow.config.start import StartConfig
from megagrow.state.optimizers import OPTIMIZERS, OptimizerKind

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class RunConfig(Section):
    """The run's directory and seed."""

    dir: PathText = "runs/default"
    # Seconds to wait for another job to release `dir` before this one fails.
    wait: Annotated[float, Field(ge=0)] = 90.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234


class LayoutConfig(Section):
    """Parallelism; the data-parallel size is world / (tensor * pipeline)."""

    tensor: Positive = 1
    pipeline: Positive = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    sequence_parallel: bool = False  # norms and dropout see 1/tensor of the sequence
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


class OptimizerConfig(Section):
    """Optimizer settings. Weight decay is decoupled, and not applied to norms and biases.

    Lion needs a learning rate 3 to 10 times lower than AdamW, a weight decay higher by the same
    factor, and betas of about [0.9, 0.99]; it ignores eps.

    Muon orthogonalises the momentum of the blocks' matrices and is AdamW, with `betas` and `eps`,
    for all other tensors. Matrices need their own rate, about 0.02; it follows the schedule of
    `lr`.
    """

    name: Literal["adamw", "lion", "muon"] = "adamw"
    lr: Rate = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NotNegative = 0.1
    grad_clip: NotNegative = 1.0  # 0 turns clipping off
    offload: Literal["none", "cpu"] = "none"  # where optimizer state is kept (ZeRO 1 to 3)
    muon_lr: Rate | None = None  # for Muon's matrices; default: lr
    momentum: Beta = 0.95  # for Muon's matrices

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
    betas: tuple[Beta, Beta] | None = None
    eps: Rate | None = None
    weight_decay: NotNegative | None = None
    grad_clip: NotNegative | None = None
    muon_lr: Rate | None = None
    momentum: Beta | None = None
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
    # Dynamic loss scaling, for fp16 only: it starts at 2**initial_scale_power, is halved when
    # gradients overflow (the step is then skipped) and doubled after `window` good steps.
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    window: Positive = 1000


class ScheduleConfig(Section):
    """Learning-rate schedule; `decay` is the fraction of steps over which WSD decays."""

    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup: Annotated[int, Field(ge=0)] | None = None  # steps; default: a tenth of the run, <= 100
    decay: Fraction = 0.1
    floor: Fraction = 0.0  # final learning rate as a fraction of the peak


class StageScheduleConfig(Section):
    """The learning-rate schedule of one growth stage, as factors on the run's schedule.

    `warmup`: the number of steps, from the stage's first on, over which the rate rises from 0.
    `decay`: the final fraction of the stage's own steps, over which the rate falls linearly to
    `floor` (relative to the rate before; default: `schedule.floor`). In the last stage it replaces
    `schedule.decay`.
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
    """Samples per optimizer step, and per forward pass of one rank."""

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
    """A growth stage: its end, and what changes at its start.

    A growth, which parameters are trained, a layout, a batch, a sequence length of the samples (at
    most the model's), optimizer settings, data: what is not given does not change. Stages without a
    growth can warm up the batch or sequence length, or change the mixture of data. `schedule`
    applies to this stage only.
    """

    until: UntilConfig
    grow: GrowConfig | None = None
    train: Trained | None = None
    layout: LayoutConfig | None = None
    batch: BatchConfig | None = None
    sequence: Positive | None = None
    data: StageDataConfig | None = None
    optimizer: StageOptimizerConfig | None = None
    schedule: StageScheduleConfig | None = None


class WandbConfig(Section):
    """Weights & Biases settings, named as in `wandb.init`."""

    project: str
    name: str | None = None  # default: chosen by Weights & Biases
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class AverageConfig(Section):
    """The average of the weights over the last steps of a run, validated along with the weights.

    `last` is the fraction of all steps, for instance a tenth of the decay.  The average is kept in
    host memory, as an fp32 copy of each rank's shard; checkpoints hold the weights themselves.
    """

    last: Annotated[float, Field(gt=0.0, le=1.0)]


class TrainConfig(Section):
    """The loop: validation, logging, early stop."""

    validate_every: Positive = 100
    validation_samples: Positive = 64
    log_every: Positive = 10
    stop_after_steps: Positive | None = None
    # Interval in steps, after a growth, of the diagnostics: divergence of twins, ranks of matrices,
    # learning of new parameters, mixing time. Null: never.
    growth_diagnostics: Positive | None = None
    tensorboard: bool = True
    prometheus_port: Annotated[int, Field(gt=0, lt=65536)] | None = None  # on rank 0's host
    # Listen address: this host only by default; with 0.0.0.0 anyone who can reach the port can
    # read.
    prometheus_address: str = "127.0.0.1"
    wandb: WandbConfig | None = None
    threads: Positive | None = None  # CPU threads per rank; default: cores / local ranks
    average: AverageConfig | None = None


class CheckpointConfig(Section):
    """When to save and how many to keep."""

    every: Positive = 500
    keep: Positive = 2
    # Write in the background of the following steps, from a copy of each rank's state in host
    # memory. Default: true on GPUs, whose hosts have spare memory and cores; false on CPUs.
    asynchronous: bool | None = None
    # An object store to copy each checkpoint to, such as s3://bucket/run, by fsspec: rank 0 uploads
    # beside the next steps, and a start takes the newest of both places. Null: none.
    remote: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.+")] | None = None
    # Every so many steps, and with each save, also copy the state to the memory of the hosts, each
    # host's share to the next host's too: a restart then reads memory, not run.dir. Null: never.
    memory_every: Positive | None = None


class WatchConfig(Section):
    """Watchdog timeouts: seconds without progress of a rank before the job is ended."""

    stall: Annotated[float, Field(gt=0)] = 60.0  # in training steps and validation
    slow: Annotated[float, Field(gt=0)] = 600.0  # while starting, growing and saving


class RecoveryConfig(Section):
    """Automatic recovery from non-finite losses and gradients, and from loss spikes."""

    skip: Annotated[int, Field(ge=0)] = 3  # consecutive bad steps that are skipped
    rollback: Annotated[int, Field(ge=0)] = 1  # rollbacks to the last checkpoint after that
    # A loss above this multiple of the recent median is bad as well; null: no limit.
    spike: Annotated[float, Field(gt=1.0)] | None = None


class LawConfig(Section):
    """Constants of L(N, S) = floor + (n_scale / N)^n_power + (s_scale / S)^s_power."""

    floor: Annotated[float, Field(ge=0)]
    n_scale: Annotated[float, Field(gt=0)]
    n_power: Annotated[float, Field(gt=0)]
    s_scale: Annotated[float, Field(gt=0)]
    s_power: Annotated[float, Field(gt=0)]
    unit: Literal["steps", "tokens"] = "tokens"
    embeddings: bool = True  # whether N includes embeddings


class OpsConfig(Section):
    """Backends of the fused ops on a GPU (MEGAGROW_KERNELS selects among megagrow's own)."""

    # A library given here must be installed and pass a numerical check before it is used.
    backend: Literal["own", "apex", "transformer_engine", "liger"] = "own"


class GrowthConfig(Section):
    """Settings of growths: the transfer, and the rules that end a stage.

    `law` is the scaling law that `planned` and `marginal` predict with: the name of a published
    law, or constants as launch/plan.py --fit prints them. `points` is the number of consecutive
    validations that `slope` is computed over, and the minimum that `marginal` fits.
    """

    staging_mib: Annotated[float, Field(gt=0, le=2**30)] = 64.0  # per rank, all buffers together
    law: Literal["kaplan", "chinchilla", "epoch"] | LawConfig = "chinchilla"
    points: Annotated[int, Field(ge=2)] = 5

    @property
    def staging_bytes(self) -> int:
        """`staging_mib` in bytes."""
        return int(self.staging_mib * 2**20)


class Config(Section):
    """The configuration of a run.

    With `init`, a file may leave `model` out, or give only what concerns training: it is completed
    from the checkpoint when the file is read (`megagrow.train.init_from`).
    """

    run: RunConfig = RunConfig()
    init: StartConfig | None = None
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
        if not until.bounded or until.looks_ahead:
            raise ValueError(
                f"stages[{last}].until.{until.rule}: no growth follows the last stage; say where "
                "the run ends, for instance until: {tokens: 1e9}, alone or with a slope"
            )
        return self

    @model_validator(mode="after")
    def _first_stage_grows_only_what_exists(self) -> Config:
        grow = self.stages[0].grow
        if grow is not None and self.init is None:
            raise ValueError(
                "stages[0].grow: the first stage starts from fresh weights and cannot grow; "
                "describe the small model under `model` and move the growth to stages[1], or "
                "start from a checkpoint with init.from"
            )
        if grow is not None and grow.restart is not None:
            raise ValueError(
                "stages[0].grow.restart: the schedule is at its start anyway; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_muon_in_stages(self) -> Config:
        for index, stage in enumerate(self.stages):
            given = stage.optimizer.model_dump(exclude_none=True) if stage.optimizer else {}
            of_muon = " and ".join(sorted(given.keys() & {"muon_lr", "momentum"}))
            if of_muon and not self.optimizer.kind.orthogonal:
                raise ValueError(
                    f"stages[{index}].optimizer: {of_muon}: only for Muon, but optimizer.name = "
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
            if asked.decay is not None and stage.until.watches:
                raise ValueError(
                    f"{key}.decay: until.{stage.until.rule} ends the stage at a step that is not "
                    "known before, so a decay into it cannot begin in time; bound the stage with "
                    "steps, tokens or flops alone, or leave the decay out"
                )
        return self
