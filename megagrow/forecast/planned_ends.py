"""Stages with `planned` ends: the planner's growth points for the sizes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.config import Config, GrowConfig, ModelConfig, UntilConfig
from megagrow.config.schema import LawConfig
from megagrow.errors import ConfigError
from megagrow.forecast.planner import Curves, best_growth, size_of
from megagrow.forecast.scaling import ScalingLaw, find_law

# Shen et al. (arXiv 2203.06211, their notebooks): the step of the schedule after a growth is
# divided by this.
_DEPTH, _WIDTH, _BOTH = 1.412, 1.776, 2.455


@dataclass(frozen=True)
class PlannedEnd:
    """Where the planner ends a stage.

    Attributes:
        index: index of the stage.
        loss: the loss at which to grow, by the law.
        tokens: from the start of the run.
        law: name of the law.
    """

    index: int
    loss: float
    tokens: float
    law: str


def run_law(config: Config) -> ScalingLaw:
    """The law of `growth.law`."""
    law = config.growth.law
    if isinstance(law, LawConfig):
        return ScalingLaw("given", **law.model_dump())
    return find_law(law)


def planned_ends(config: Config, models: Sequence[ModelConfig]) -> tuple[PlannedEnd, ...]:
    """The planner's end of each stage with `planned: true`.

    Earlier stages must be planned as well, or not change the model: a law's prediction is for
    training from scratch.

    Args:
        config: stages, batch and law are used.
        models: the models of the stages.

    Raises:
        ConfigError: no saving is predicted, or an earlier stage has another kind of end.
    """
    found: list[PlannedEnd] = []
    if config.init is not None and any(stage.until.planned for stage in config.stages):
        raise ConfigError(
            "until.planned: the law is of training from scratch, but the run starts from "
            f"init.from = {config.init.from_}",
            fix="end the stages by steps, tokens, flops, slope or marginal",
        )
    law = run_law(config)
    curves = Curves(law, batch_tokens=config.batch.global_ * config.model.sequence)
    tokens = begun = 0.0
    for index, stage in enumerate(config.stages[:-1]):
        if stage.until.rule is None or stage.until.watches:
            if any(later.until.planned for later in config.stages[index:]):
                raise ConfigError(
                    f"stages[{index}].until: the planner predicts a run only from its start",
                    expected="planned: true in every stage before one that has it",
                    fix="set planned: true here too, or take another rule later",
                )
            break
        small, large = (size_of(models[i], law) for i in (index, index + 1))
        growth = None if small.n >= large.n else best_growth(curves, small, large, added_loss=0.0)
        took = 0.0 if growth is None else curves.tokens(small, growth.loss) - begun
        if growth is None or took <= 0:
            raise ConfigError(
                f"stages[{index}].until.planned: the law sees no saving in this stage",
                found=f"{small.n:,} to {large.n:,} parameters, law {law.name}",
                expected="a stage with a predicted saving",
                fix="leave the stage out, or end it by steps, tokens, flops or slope",
            )
        tokens += took
        begun = curves.tokens(large, growth.loss)
        found.append(PlannedEnd(index, growth.loss, tokens, law.name))
    return tuple(found)


def with_planned_ends(config: Config, ends: Sequence[PlannedEnd]) -> Config:
    """The configuration with the planner's bounds; a stage's own bound is kept if it is earlier."""
    stages = list(config.stages)
    for end in ends:
        until = stages[end.index].until
        if until.tokens is None or end.tokens < until.tokens:
            bound = UntilConfig(tokens=end.tokens)
            stages[end.index] = stages[end.index].model_copy(update={"until": bound})
    return config.model_copy(update={"stages": stages})


def restart_ratio(grow: GrowConfig, before: ModelConfig, after: ModelConfig) -> float:
    """The divisor of the schedule position at a growth.

    Args:
        grow: its `restart` is a number, or `paper`.
        before, after: the models; the sizes that grow matter, not the operator's name.

    Raises:
        ConfigError: `paper`, and neither depth nor width grows.
    """
    if isinstance(grow.restart, float):
        return grow.restart
    deep = after.layers > before.layers
    wide = after.hidden > before.hidden or after.ffn > before.ffn
    if not (deep or wide):
        raise ConfigError(
            "grow.restart: the paper has ratios for growths of depth and of width alone",
            found=f"paper, with operator {grow.operator}",
            expected="a growth of model.layers, model.hidden or model.ffn",
            fix="give restart a number (at least 1), or leave it out",
        )
    return _BOTH if deep and wide else _WIDTH if wide else _DEPTH
