"""Where each growth stage starts and ends, computed exactly before the run starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megagrow.config import (
    BatchConfig,
    Config,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    UntilConfig,
)
from megagrow.config.data import Reading, StageDataConfig
from megagrow.config.rules import BOUNDS
from megagrow.errors import ConfigError


@dataclass(frozen=True)
class StagePlan:
    """One growth stage: the updates `start_step` ... `end_step - 1` and what they consume.

    Steps, tokens and FLOPs count from the start of the run; the end of a stage is the start of the
    next, except that the FLOPs of fitting a growth come in between. FLOPs are those of the model
    (forward and backward), not of a rank.
    """

    index: int
    start_step: int
    end_step: int
    start_tokens: int
    end_tokens: int
    start_flops: int
    end_flops: int
    model: ModelConfig
    layout: LayoutConfig
    batch: BatchConfig
    sequence: int

    @property
    def seen(self) -> ModelConfig:
        """The model at the stage's sample length, which determines FLOPs and memory."""
        return self.model.model_copy(update={"sequence": self.sequence})

    @property
    def steps(self) -> int:
        """Number of optimizer steps in the stage."""
        return self.end_step - self.start_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.batch.global_ * self.sequence

    @property
    def flops_per_step(self) -> int:
        """FLOPs per optimizer step, over all ranks; 0 in a stage without steps."""
        return (self.end_flops - self.start_flops) // max(1, self.steps)


def resolve_stages(
    config: Config,
    *,
    models: Sequence[ModelConfig],
    layouts: Sequence[LayoutConfig],
    flops_per_token: Callable[[int, ModelConfig], int],
    growth_flops: Sequence[int] = (),
    ends: Sequence[int] = (),
) -> tuple[StagePlan, ...]:
    """The stages of `config` in steps, tokens and FLOPs.

    A stage ends after the first step that reaches its bound (`until`), so it may exceed a bound in
    tokens or FLOPs by less than one step. A stage that ends by a rule alone is given a latest end:
    consecutive stages of this kind divide the range up to the next bound evenly.

    A stage whose bound is exactly where it begins has no steps: this allows several growths at one
    step, or a growth before the first step (of imported weights, `until: {steps: 0}`). The last
    stage has at least one step.

    Args:
        config: only `stages` and `batch` are used.
        models: the model of each stage, after its growth.
        layouts: the layout of each stage.
        flops_per_token: training FLOPs per token of a stage (its index, its model), forward and
            backward.
        growth_flops: FLOPs of fitting the growth into each stage; none by default.
        ends: steps at which the first stages actually ended, if a rule ended them.

    Raises:
        ConfigError: a stage would be empty because its bound is reached before it starts, or its
            samples are longer than the model's sequence.
    """
    if not len(models) == len(layouts) == len(config.stages):
        raise ValueError(
            f"{len(config.stages)} stages need as many models and layouts, "
            f"not {len(models)} and {len(layouts)}"
        )
    plans: list[StagePlan] = []
    steps = tokens = flops = 0
    bounds = _bounds(config)
    for index, (model, layout) in enumerate(zip(models, layouts, strict=True)):
        batch, length = stage_batch(config, index), sample_length(config, model, index)
        flops += growth_flops[index] if growth_flops else 0
        tokens_a_step = batch.global_ * length
        seen = model.model_copy(update={"sequence": length})
        flops_a_step = tokens_a_step * flops_per_token(index, seen)
        unit, bound = ("steps", Fraction(ends[index])) if index < len(ends) else bounds[index]
        done, a_step = {
            "steps": (steps, 1),
            "tokens": (tokens, tokens_a_step),
            "flops": (flops, flops_a_step),
        }[unit]
        count = -((done - bound) // a_step)  # rounded up: the first step that reaches the bound
        last = index == len(config.stages) - 1
        if count < 0 or (count == 0 and (last or (done != bound and index >= len(ends)))):
            raise ConfigError(
                f"stages[{index}].until.{unit} = {_shown(bound)} leaves the stage no step: "
                + (f"stages[{index - 1}] ends at {_shown(done)} {unit} " if index else "")
                + "(bounds count from the start of the run)",
                found=_shown(bound),
                expected=f"{'more than' if last else 'at least'} {_shown(done)}",
                fix=f"raise stages[{index}].until.{unit}"
                + (", or end the stage before it earlier" if index else ""),
            )
        plan = StagePlan(
            index=index,
            start_step=steps,
            end_step=steps + count,
            start_tokens=tokens,
            end_tokens=tokens + count * tokens_a_step,
            start_flops=flops,
            end_flops=flops + count * flops_a_step,
            model=model,
            layout=layout,
            batch=batch,
            sequence=length,
        )
        plans.append(plan)
        steps, tokens, flops = plan.end_step, plan.end_tokens, plan.end_flops
    return tuple(plans)


def stage_of(plans: Sequence[StagePlan], step: int) -> StagePlan:
    """The stage of update `step`, counted from 0.

    Raises:
        ValueError: there is no such update.
    """
    for plan in plans:
        if plan.start_step <= step < plan.end_step:
            return plan
    raise ValueError(f"step {step} is not among the run's steps 0 to {plans[-1].end_step - 1}")


def stage_batch(config: Config, index: int) -> BatchConfig:
    """A stage's own batch, or else the last one given before it."""
    given = [stage.batch for stage in config.stages[: index + 1] if stage.batch is not None]
    return given[-1] if given else config.batch


def stage_data(config: Config, index: int) -> StageDataConfig:
    """A stage's own datasets, or else the last given before it."""
    given = [stage.data for stage in config.stages[: index + 1] if stage.data is not None]
    return next((data for data in reversed(given) if data.paths), config.data)


def stage_documents(config: Config, index: int) -> Reading:
    """Whether the documents of a stage's samples see each other (`packed`), or not (`mask`)."""
    given = [stage.data.documents for stage in config.stages[: index + 1] if stage.data is not None]
    return next((found for found in reversed(given) if found is not None), config.data.documents)


def stage_optimizer(config: Config, index: int) -> OptimizerConfig:
    """The optimizer settings of a stage: the run's, with all changes up to this stage."""
    settings = config.optimizer
    for stage in config.stages[: index + 1]:
        settings = settings.changed(stage.optimizer)
    return settings


def sample_length(config: Config, model: ModelConfig, index: int) -> int:
    """Sample length of a stage in tokens, given its model.

    Raises:
        ConfigError: the samples are longer than the model's sequence.
    """
    given = [stage.sequence for stage in config.stages[: index + 1] if stage.sequence is not None]
    if not given:
        return model.sequence
    wanted = given[-1]
    if wanted > model.sequence:
        raise ConfigError(
            f"stages[{index}].sequence: samples longer than the model's sequence",
            found=wanted,
            expected=f"at most {model.sequence}",
            fix="shorten it, or grow the model's sequence (operator: sequence)",
        )
    return wanted


def _bounds(config: Config) -> list[tuple[str, Fraction]]:
    """The unit and the bound of each stage; for a stage ended by a rule alone, its latest end."""
    found: list[tuple[str, Fraction]] = []
    waiting = 0
    for stage in config.stages:
        if not stage.until.bounded:
            waiting += 1
            continue
        unit, bound = _bound(stage.until)
        found += [(unit, bound * i / (waiting + 1)) for i in range(1, waiting + 1)]
        found.append((unit, bound))
        waiting = 0
    return found


def _bound(until: UntilConfig) -> tuple[str, Fraction]:
    """The unit and the bound of a stage; a float is converted exactly."""
    for unit in BOUNDS:
        value = getattr(until, unit)
        if value is not None:
            return unit, Fraction(value)
    raise AssertionError("a stage without a bound")


def _shown(value: Fraction | int) -> str:
    """Exact and readable: an integer with separators, or a decimal."""
    return f"{int(value):,}" if value == int(value) else f"{float(value)}"
