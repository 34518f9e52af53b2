"""The plan of a run, computed and checked before any process starts work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megagrow.config import Config, GrowConfig, LayoutConfig, ModelConfig, OptimizerConfig
from megagrow.config.batch import accumulation
from megagrow.engine.deepspeed.config import deepspeed_config
from megagrow.errors import ConfigError, MegagrowError
from megagrow.forecast.planned_ends import (
    PlannedEnd,
    planned_ends,
    restart_ratio,
    with_planned_ends,
)
from megagrow.growth.new_blocks import retrained
from megagrow.growth.operators.ramp import Ramp
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import Growth, plan_growth
from megagrow.growth.training import trained_stages
from megagrow.models.common.parallel import require_tensor_parallel
from megagrow.models.flops import forward_flops_by_place, train_flops_per_token
from megagrow.schedule import LearningRate, StagePlan, learning_rate, resolve_stages
from megagrow.schedule.stages import sample_length, stage_batch, stage_optimizer
from megagrow.state.catalog import Catalog, Slot
from megagrow.state.layout import Layout, make_layout
from megagrow.state.optimizers import ADAMW, OPTIMIZERS, OptimizerKind
from megagrow.state.placement import Placement
from megagrow.train.documents import require_separation
from megagrow.train.fit import fit_flops
from megagrow.train.rates import phases, require_settled_betas


@dataclass(frozen=True)
class Stage:
    """One growth stage, resolved.

    Attributes:
        plan: its steps, model and batch.
        layout: its process grid.
        growth, grow: the growth at its start, if any, and the section that asks for it.
        optimizer: the optimizer's settings.
        catalog: the model's tensors; those that the stage does not train are marked as frozen.
    """

    plan: StagePlan
    layout: Layout
    growth: Growth | None
    grow: GrowConfig | None
    optimizer: OptimizerConfig
    catalog: Catalog

    @property
    def index(self) -> int:
        """Index of the stage, from 0."""
        return self.plan.index

    @property
    def model(self) -> ModelConfig:
        """The model of the stage."""
        return self.plan.model

    @property
    def seen(self) -> ModelConfig:
        """The model at the sequence length of the stage's samples."""
        return self.plan.seen

    def settings(self, config: Config) -> Config:
        """The run's configuration with the stage's batch and optimizer settings."""
        return config.model_copy(update={"batch": self.plan.batch, "optimizer": self.optimizer})

    def placement(self, rules: OptimizerRules) -> Placement:
        """The placement in this stage, under the rules that growths have left."""
        by_flops = self.plan.layout.partition == "flops"
        return Placement(
            self.catalog,
            self.layout,
            group_keys(self.catalog, rules, OPTIMIZERS[self.optimizer.name]),
            forward_flops_by_place(self.model) if by_flops else None,
        )


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run, and its learning rate.

    Attributes:
        stages: the growth stages.
        learning_rate: over all stages.
        optimizer: the optimizer of all stages.
        planned: the planner's output for stages that end where it says.
    """

    stages: tuple[Stage, ...]
    learning_rate: LearningRate
    optimizer: OptimizerKind = ADAMW
    planned: tuple[PlannedEnd, ...] = ()
    _placements: dict[int, Placement] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The optimizer's slots, the parameter first."""
        return self.optimizer.slots

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        return self.stages[-1].plan.end_step

    def rules_at(self, index: int, *, strict: bool = False) -> OptimizerRules:
        """The optimizer rules that the growths up to a stage leave.

        New blocks count from the planned step of their growth, so this is for plans;
        a run keeps its own rules.

        Args:
            index: of the stage.
            strict: reject what bias correction would get wrong.

        Raises:
            GrowthError, ConfigError: there is such a case.
        """
        rules, counted = OptimizerRules(), 0  # `counted`: where the optimizer's step count starts
        first = self.stages[0]
        if first.growth is not None:
            betas = first.optimizer.bias_correction if strict else None
            rules = first.growth.rules_after(rules, step=0, betas=betas)
        for before, stage in zip(self.stages[:index], self.stages[1 : index + 1], strict=True):
            betas = stage.optimizer.bias_correction if strict else None
            if stage.growth is not None and stage.growth.policy.restart_steps:
                counted = stage.plan.start_step
            step = stage.plan.start_step - counted
            if stage.growth is not None:
                rules = stage.growth.rules_after(rules, step=step, betas=betas)
            else:
                rules = retrained(rules, before.catalog, stage.catalog, step=step)
            if strict:
                earlier = before.optimizer.bias_correction
                require_settled_betas(stage.index, (earlier, betas), step=step, rules=rules)
        return rules

    def placement(self, index: int) -> Placement:
        """The placement in a stage."""
        if index not in self._placements:  # slow for thousands of ranks
            self._placements[index] = self.stages[index].placement(self.rules_at(index))
        return self._placements[index]


def plan_run(
    config: Config, *, world: int, vocabulary: int | None, ends: Sequence[int] = ()
) -> RunPlan:
    """Resolve a run for a number of processes.

    Args:
        config: the run.
        world: number of processes.
        vocabulary: the tokenizer's size, if known; `model.vocab` overrides it.
        ends: steps at which the first stages actually ended, for a run in progress.

    Raises:
        ConfigError: stages, layouts or batch do not fit together, the model's vocabulary
            is smaller than the tokenizer's, or a pass-through DeepSpeed setting conflicts.
        GrowthError: an operator or a state policy is unknown or does not fit.
    """
    config = with_vocabulary(config, vocabulary)
    models, growths = _models(config)
    growths, catalogs = trained_stages(config, models, growths)
    layouts = _layouts(config, world)
    layout_configs = [_layout_config(config, i) for i in range(len(config.stages))]
    planned = planned_ends(config, models)
    bounded = with_planned_ends(config, planned)
    fitting = [_fit_flops(config, models, growths, i) for i in range(len(models))]

    def resolved(ends: Sequence[int]) -> tuple[StagePlan, ...]:
        return resolve_stages(
            bounded,
            models=models,
            layouts=layout_configs,
            flops_per_token=lambda i, seen: train_flops_per_token(seen, catalogs[i]),
            growth_flops=fitting,
            ends=ends,
        )

    plans = resolved(ends)
    own_rates = phases(config, plans)
    stages = []
    rewarms = []
    restarts = []
    for i, stage in enumerate(config.stages):
        growth = growths[i]
        if stage.schedule is not None and stage.schedule.warmup is not None:
            rewarms.append((plans[i].start_step, stage.schedule.warmup))
        if growth is not None and growth.policy.new_block_peak is None and growth.rewarm:
            rewarms.append((plans[i].start_step, growth.rewarm))
        if growth is not None and growth.ramp is not None:
            _require_time(growth.ramp, plans[i])
        if growth is not None and stage.grow is not None and stage.grow.restart is not None:
            try:
                ratio = restart_ratio(stage.grow, models[i - 1], models[i])
            except ConfigError as error:
                raise error.within(f"stages[{i}]", setting="grow") from None
            restarts.append((plans[i].start_step, ratio))
        layout = _as_run(config, layouts[i])
        optimizer = stage_optimizer(config, i)
        require_separation(config, models[i], i)
        stages.append(Stage(plans[i], layout, growth, stage.grow, optimizer, catalogs[i]))
        of_stage = stages[i].settings(config)
        accumulation(of_stage.batch, layouts[i])
        _require_fit(plans[i].seen, layouts[i], layout_configs[i], key=_layout_key(config, i))
        # Reject it now rather than when the stage begins.
        deepspeed_config(of_stage, layouts[i], parameters=catalogs[i].parameters)
    totals = [resolved(ends[:i])[-1].end_step for i in range(len(ends) + 1)]
    rate = learning_rate(
        config,
        total_steps=plans[-1].end_step,
        rewarms=rewarms,
        restarts=restarts,
        phases=own_rates,
        moved=[
            (step, before)
            for stage, step, before, after in zip(
                config.stages, ends, totals, totals[1:], strict=False
            )
            if stage.until.watches and before != after
        ],
    )
    plan = RunPlan(tuple(stages), rate, config.optimizer.kind, planned)
    for i in range(len(stages)):
        plan.placement(i)  # raises if the optimizer does not support it
    plan.rules_at(len(stages) - 1, strict=True)
    return plan


def with_vocabulary(config: Config, vocabulary: int | None) -> Config:
    """The configuration with `model.vocab` set: its own, or the tokenizer's.

    Raises:
        ConfigError: neither is known, or the model's is smaller than the tokenizer's.
    """
    given = config.model.vocab
    first = config.stages[0].grow
    if given is not None and first is not None and first.target is not None:
        given = first.target.vocab or given  # grown before the first step
    if given is None:
        if vocabulary is None:
            raise ConfigError(
                "model.vocab is not set and there is no tokenizer to take it from",
                fix="set model.vocab, or give data.path",
            )
        model = config.model.model_copy(update={"vocab": vocabulary})
        return config.model_copy(update={"model": model})
    if vocabulary is not None and given < vocabulary:
        fix = "leave model.vocab out: it is then taken from the tokenizer"
        if config.init is not None:
            fix = "prepare the data with the tokenizer of init.from: launch/prepare_data.py "
            fix += "--tokenizer"
        if first is not None and first.tokenizer is not None:
            raise ConfigError(
                "stages[0].grow.tokenizer: the data was prepared with a larger one",
                found=f"{given} tokens",
                expected=f"at least {vocabulary}",
                fix="set stages[0].grow.tokenizer to data.path, or prepare the data with it",
            )
        raise ConfigError(
            "model.vocab is smaller than the tokenizer's vocabulary",
            found=given,
            expected=f"at least {vocabulary}",
            fix=fix,
        )
    return config


def _models(config: Config) -> tuple[list[ModelConfig], list[Growth | None]]:
    """The model of each stage, and the growth at its start, if any."""
    model = config.model
    models: list[ModelConfig] = []
    growths: list[Growth | None] = []
    for index, stage in enumerate(config.stages):
        growth = None
        if stage.grow is not None:
            try:
                model, growth = plan_growth(stage.grow, model)
            except MegagrowError as error:
                raise error.within(f"stages[{index}]", setting="grow") from None
            if stage.grow.tokenizer is not None and (index or config.init is None):
                raise ConfigError(
                    f"stages[{index}].grow.tokenizer: a run has one dataset, and so one tokenizer "
                    "from its first step to its last",
                    fix="end the run before this stage, and start one on data of the new tokenizer "
                    "with init.from and this growth in stages[0]; or grow with launch/grow.py",
                )
            if index == 0 and growth.fit_steps:
                raise ConfigError(
                    f"stages[0].grow.operator: {growth.operator.name} is fitted on the data by the "
                    "small model, which the first stage's processes do not hold",
                    fix="put a first stage without it, until: {steps: 0}, and the growth in "
                    "stages[1]",
                )
        models.append(model)
        growths.append(growth)
    return models, growths


def _fit_flops(
    config: Config, models: list[ModelConfig], growths: list[Growth | None], index: int
) -> int:
    """FLOPs of fitting a stage's growth: on samples of the previous stage, in the new batch."""
    growth = growths[index]
    if growth is None or not growth.fit_steps:
        return 0
    return fit_flops(
        growth,
        model=models[index],
        samples=stage_batch(config, index).global_,
        sequence=sample_length(config, models[index - 1], index - 1),
    )


def _layout_config(config: Config, index: int) -> LayoutConfig:
    """A stage's own layout section, else the last one given before it."""
    given = [stage.layout for stage in config.stages[: index + 1] if stage.layout is not None]
    return given[-1] if given else config.layout


def _layouts(config: Config, world: int) -> list[Layout]:
    layouts = []
    for i in range(len(config.stages)):
        wanted = _layout_config(config, i)
        layouts.append(
            make_layout(
                world=world,
                tensor=wanted.tensor,
                pipeline=wanted.pipeline,
                zero=wanted.zero,
                key=_layout_key(config, i),
            )
        )
    return layouts


def _as_run(config: Config, layout: Layout) -> Layout:
    """Run as ZeRO 0 when data parallelism is 1: there is nothing to shard, and ZeRO adds copies.

    Applies if gradients are accumulated in fp32 either way, and nothing is offloaded or passed
    through that needs ZeRO.
    """
    asked_for = config.optimizer.offload != "none" or "zero_optimization" in config.deepspeed
    if layout.data > 1 or config.precision.dtype != "fp32" or asked_for:
        return layout
    return replace(layout, zero=0)


def _layout_key(config: Config, index: int) -> str:
    """A stage's layout key, as a user writes it."""
    given = [i for i in range(index + 1) if config.stages[i].layout is not None]
    return f"stages[{given[-1]}].layout" if given else "layout"


def _require_time(ramp: Ramp, stage: StagePlan) -> None:
    """Require that a stage finishes its ramp, since its last checkpoint is of a plain model."""
    steps = stage.end_step - stage.start_step
    if steps < ramp.steps:
        raise ConfigError(
            f"stages[{stage.index}]: is over before all units of its growth are in",
            found=f"{steps} steps, grow.ramp {ramp.steps}",
            expected=f"at least {ramp.steps} steps",
            fix=f"set stages[{stage.index}].grow.ramp={steps} or less, or until to more",
        )


def _require_fit(model: ModelConfig, layout: Layout, spread: LayoutConfig, *, key: str) -> None:
    """Reject a model that cannot be split as its layout requires."""
    require_tensor_parallel(model, tensor=layout.tensor, sequence=spread.sequence_parallel, key=key)
    entries = model.layers + 2
    if layout.pipeline > entries:
        raise ConfigError(
            f"{key}.pipeline: more stages than the model has layers",
            found=layout.pipeline,
            expected=f"at most {entries} (embedding, {model.layers} blocks, head)",
            fix=f"set {key}.pipeline={entries} or less",
        )
