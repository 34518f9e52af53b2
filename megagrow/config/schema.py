"""The schema of a run's configuration file.

Every section is a frozen pydantic model that rejects unknown keys; checks across several keys name
them all. Sections are in the other modules of this package; files and overrides are loaded by
`megagrow.config.load`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagrow.config.data import DataConfig, StageDataConfig
from megagrow.config.growths import GrowConfig, Trained, UntilConfig
from megagrow.config.loop import (
    CheckpointConfig,
    RecoveryConfig,
    RunConfig,
    TrainConfig,
    WatchConfig,
)
from megagrow.config.model import ModelConfig
from megagrow.config.optimization import (
    BatchConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    StageOptimizerConfig,
    StageScheduleConfig,
)
from megagrow.config.section import Positive, Section
from megagrow.config.start import StartConfig


class LayoutConfig(Section):
    """Parallelism; the data-parallel size is world / (tensor * pipeline)."""

    tensor: Positive = 1
    """Tensor-parallel size."""
    pipeline: Positive = 1
    """Number of pipeline stages."""
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed's ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    sequence_parallel: bool = False
    """Norms and dropout see 1 / `tensor` of the sequence."""
    partition: Literal["parameters", "flops"] = "parameters"
    """What the pipeline stages balance."""

    @model_validator(mode="after")
    def _pipeline_needs_low_zero(self) -> LayoutConfig:
        if self.pipeline > 1 and self.zero > 1:
            raise ValueError(
                f"zero = {self.zero} does not go with pipeline = {self.pipeline}: DeepSpeed's "
                "pipeline engine takes ZeRO 0 or 1 only; set layout.zero=1 (optimizer state is "
                "then sharded all the same), or layout.pipeline=1 with layout.tensor raised"
            )
        return self


class StageConfig(Section):
    """A growth stage: its end, and what changes at its start; what is not given does not change.

    A stage without a growth can warm up the batch or the sequence length, or change the data.
    """

    until: UntilConfig
    """Where the stage ends."""
    grow: GrowConfig | None = None
    """The growth at its start."""
    train: Trained | None = None
    """What is trained: `new` (what the growth adds), `all`, or a list of roles and names of
    tensors (docs/growth-operators.md)."""
    layout: LayoutConfig | None = None
    """The layout from this stage on."""
    batch: BatchConfig | None = None
    """The batch from this stage on."""
    sequence: Positive | None = None
    """Tokens of a sample from this stage on, at most the model's."""
    data: StageDataConfig | None = None
    """What is trained on from this stage on (docs/data.md)."""
    optimizer: StageOptimizerConfig | None = None
    """Optimizer settings from this stage on (docs/rates.md)."""
    schedule: StageScheduleConfig | None = None
    """The learning-rate schedule of this stage alone."""


class LawConfig(Section):
    """Constants of L(N, S) = floor + (n_scale / N)^n_power + (s_scale / S)^s_power.

    They are what `megagrow plan --fit` prints.
    """

    floor: Annotated[float, Field(ge=0)]
    """The loss that no model and no amount of data goes below, in nats."""
    n_scale: Annotated[float, Field(gt=0)]
    """Scale of the parameters N."""
    n_power: Annotated[float, Field(gt=0)]
    """Exponent of the parameters."""
    s_scale: Annotated[float, Field(gt=0)]
    """Scale of the amount of data S, in `unit`."""
    s_power: Annotated[float, Field(gt=0)]
    """Exponent of the amount of data."""
    unit: Literal["steps", "tokens"] = "tokens"
    """What S counts."""
    embeddings: bool = True
    """Whether N includes embeddings."""


class OpsConfig(Section):
    """Backends of the fused ops on a GPU (MEGAGROW_KERNELS selects among megagrow's own)."""

    backend: Literal["own", "apex", "transformer_engine", "liger"] = "own"
    """megagrow's own kernels, or a library, which must be installed and pass a numerical check
    before it is used."""


class GrowthConfig(Section):
    """Settings of growths: the transfer, and the rules that end a stage."""

    staging_mib: Annotated[float, Field(gt=0, le=2**30)] = 64.0
    """MiB of staging buffers on each rank, all together."""
    law: Literal["kaplan", "chinchilla", "epoch"] | LawConfig = "chinchilla"
    """The scaling law that `planned` and `marginal` predict with: a published one, or constants."""
    points: Annotated[int, Field(ge=2)] = 5
    """Validations that `slope` is computed over, and the fewest that `marginal` fits."""

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
    """Directory and seed."""
    init: StartConfig | None = None
    """The checkpoint to start from; null: fresh weights."""
    model: ModelConfig
    """The model of the first stage, before its growth."""
    layout: LayoutConfig = LayoutConfig()
    """The layout of the first stage."""
    data: DataConfig
    """What is trained on and validated on (docs/data.md)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning-rate schedule."""
    batch: BatchConfig
    """The batch of the first stage."""
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    """The growth stages, in order."""
    train: TrainConfig = TrainConfig()
    """Validation and logs."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    growth: GrowthConfig = GrowthConfig()
    """What all growths share."""
    ops: OpsConfig = OpsConfig()
    """Fused ops."""
    watch: WatchConfig = WatchConfig()
    """When a rank counts as hung."""
    recovery: RecoveryConfig = RecoveryConfig()
    """What follows a loss that is not finite."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further settings of DeepSpeed's configuration, for what this file has no setting of."""

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
        if self.stages[0].data is not None:
            raise ValueError("stages[0].data: what a run starts with is in data; move it there")
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
