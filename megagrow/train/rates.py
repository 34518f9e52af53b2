"""Learning rates of growth stages, their own and those of their shapes: checked and described."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megagrow.config import Config, ModelConfig
from megagrow.config.optimization import StageScheduleConfig
from megagrow.errors import ConfigError
from megagrow.growth.optimizer_rules import OptimizerRules, YoungBlocks
from megagrow.schedule import StagePlan
from megagrow.schedule.learning_rate import Phase
from megagrow.schedule.stages import stage_optimizer
from megagrow.state.catalog import Catalog
from megagrow.state.optimizers import OptimizerKind
from megagrow.state.parts import PARTS, part_of
from megagrow.state.roles import FINAL_NORM

_CLOSE = 0.01  # of the rate, as for new blocks


def phases(config: Config, plans: tuple[StagePlan, ...]) -> tuple[Phase, ...]:
    """The stages with their own peak or decay, in the schedule's form.

    Raises:
        ConfigError: a stage is too short for its warm-up and decay.
    """
    found: list[Phase] = []
    for plan, stage in zip(plans, config.stages, strict=True):
        asked = stage.schedule or StageScheduleConfig()
        decay = 0 if asked.decay is None else max(1, round(asked.decay * plan.steps))
        needed = decay + (asked.warmup or 0)
        if needed > plan.steps:
            raise ConfigError(
                f"stages[{plan.index}].schedule: warm-up and decay do not fit into the stage",
                found=f"{asked.warmup or 0} + {decay} steps",
                expected=f"at most {plan.steps}, the steps of the stage",
                fix=f"lower stages[{plan.index}].schedule, or end the stage later",
            )
        peak = stage_optimizer(config, plan.index).lr
        floor = config.schedule.floor if asked.floor is None else asked.floor
        before = found[-1] if found else Phase(0, 0, config.optimizer.lr)
        if decay or before.decay or peak != before.peak:
            found.append(Phase(plan.start_step, plan.end_step, peak, decay, floor if decay else 0))
    return tuple(found)


def require_settled_betas(
    index: int,
    betas: tuple[tuple[float, float] | None, tuple[float, float] | None],
    *,
    step: int,
    rules: OptimizerRules,
) -> None:
    """Reject new betas while the bias correction of the existing moments still matters.

    AdamW corrects a moment built from t updates by 1 - beta^t.  With another beta that is not
    the sum of the moment's weights, and the learning rate would be off until the correction no
    longer matters.

    Args:
        index: of the stage.
        betas: of the previous stage and of this one; None where there is no correction.
        step: the optimizer's count at the start of the stage; 0: the moments are zero.
        rules: the rules left by growths, including this stage's.

    Raises:
        ConfigError: the learning rate would be off by 1 % or more.
    """
    before, after = betas
    if before is None or after is None or before == after:
        return
    young = [one for blocks in rules.young.values() for one in _generations(blocks)]
    ages = {step, *(step - blocks.born for blocks in young)}
    wrong = [
        age
        for age in ages
        if age > 0 and abs(_correction(after, age) / _correction(before, age) - 1.0) >= _CLOSE
    ]
    if wrong:
        raise ConfigError(
            f"stages[{index}].optimizer.betas: AdamW's bias correction still counts for moments "
            f"that {min(wrong):,} updates have made, and it would be wrong under other betas",
            found=f"{list(before)} -> {list(after)}",
            expected="a change once beta^t is small under both",
            fix=f"change the betas in a later stage, or set stages[{index}].grow.state_policy to "
            "reset, after which all moments start again",
        )


def _generations(blocks: YoungBlocks) -> list[YoungBlocks]:
    return [blocks, *(_generations(blocks.inside) if blocks.inside else ())]


def _correction(betas: tuple[float, float], age: int) -> float:
    """The factor by which bias correction scales an update, after `age` updates."""
    return math.sqrt(1.0 - betas[1] ** age) / (1.0 - betas[0] ** age)


def rates_in_words(config: Config, index: int) -> list[str]:
    """A stage's own settings, one line each for optimizer and schedule."""
    stage, lines = config.stages[index], []
    if stage.optimizer is not None:
        changed = stage.optimizer.model_dump(exclude_none=True)
        parts = [f"{key} {_shown(value)}" for key, value in changed.items()]
        lines.append(f"{', '.join(parts)} from here on")
    if stage.schedule is not None:
        asked, parts = stage.schedule, []
        if asked.warmup is not None:
            parts.append(f"warm-up over its first {asked.warmup} steps")
        if asked.decay is not None:
            floor = config.schedule.floor if asked.floor is None else asked.floor
            parts.append(f"decay over the last {asked.decay:.3g} of it to {floor:g} of its rate")
        lines.append(", ".join(parts))
    return [line for line in lines if line]


def start_in_words(catalog: Catalog) -> list[str]:
    """How new parameters are initialised: standard deviations by their part in the model."""
    normal = [(part_of(t), t.init.std) for t in catalog if t.init.kind == "normal"]
    gains = [("final norm's gain", t.init.std) for t in catalog if t.init.kind == "constant"]
    return [_by_part([*normal, *gains])]


def shape_in_words(model: ModelConfig, catalog: Catalog, optimizer: OptimizerKind) -> list[str]:
    """Learning rates that follow from a model's shape, if it has a base shape (muP).

    Args:
        model: the model.
        catalog: its tensors.
        optimizer: its optimizer.
    """
    if model.mup is None:
        return []
    rates = []
    for tensor in catalog:
        orthogonal = optimizer.orthogonalises(tensor)
        rate = tensor.rates.orthogonal if orthogonal else tensor.rates.lr
        rates.append(("final norm" if tensor.role in FINAL_NORM else part_of(tensor), rate))
    base = ", ".join(f"{key} {n:g}" for key, n in model.mup.model_dump(exclude_none=True).items())
    return [f"times {_by_part(rates)} (model.mup: {base})"]


def _by_part(numbers: Sequence[tuple[str, float]]) -> str:
    """Numbers of tensors in words: the smallest and the greatest of each kind."""
    ends: dict[str, list[float]] = {kind: [] for kind in PARTS}
    for kind, number in numbers:
        ends.setdefault(kind, []).append(number)
    return ", ".join(
        f"{kind} {' to '.join(f'{n:.3g}' for n in sorted({min(found), max(found)}))}"
        for kind, found in ends.items()
        if found
    )


def _shown(value: object) -> str:
    return " ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value:g}"
