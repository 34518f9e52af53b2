"""The growths that the benchmark measures: layouts, operator and model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megagrow.config import Config, LayoutConfig, ModelConfig
from megagrow.config.load import in_words, parse_config
from megagrow.errors import ConfigError
from megagrow.models.common.parallel import require_tensor_parallel
from megagrow.state.layout import make_layout
from megagrow.train.run_plan import plan_run

STEPS_BEFORE = 10  # optimizer steps assumed done before the growth


@dataclass(frozen=True)
class Case:
    """One growth to measure.

    Attributes:
        old, new: the layouts before and after it.
        operator, factor, policy: the growth; the policy None is the operator's default.
    """

    old: LayoutConfig
    new: LayoutConfig
    operator: str = "width"
    factor: int = 2
    policy: str | None = None

    def __str__(self) -> str:
        return f"{self.operator} x{self.factor}, {_short(self.old)} -> {_short(self.new)}"


def standard_cases(world: int) -> list[Case]:
    """Pairs of layouts with a growth each, as in a run that scales out."""
    if world != 4:
        raise ConfigError(
            "--pairs standard: is made for 4 processes",
            found=f"--ranks {world}",
            fix="give --ranks 4, or --from-layout and --to-layout of your own",
        )
    data: dict[str, Any] = {"zero": 1}
    both: dict[str, Any] = {"tensor": 2, "zero": 1}
    mixed: dict[str, Any] = {"tensor": 2, "pipeline": 2, "zero": 1}
    whole: dict[str, Any] = {"tensor": 4, "zero": 0}
    pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("width", data, data),
        ("width", data, both),
        ("width", both, both),
        ("width", {"tensor": 2, "zero": 2}, {"tensor": 4, "zero": 0}),
        ("width", {"zero": 3}, {"zero": 3}),
        ("depth_stack", data, data),
        ("depth_stack", both, mixed),
        ("depth_stack", whole, mixed),
        ("depth_stack", {"zero": 3}, both),
    ]
    return [
        Case(LayoutConfig(**old), LayoutConfig(**new), operator=operator)
        for operator, old, new in pairs
    ]


def read_layout(text: str, *, world: int, option: str) -> LayoutConfig:
    """Parse a layout such as `tensor=2,pipeline=1,zero=1`; `data` is optional, and must then match.

    Raises:
        ConfigError: it cannot be parsed or does not match the number of processes.
    """
    settings = dict(item.partition("=")[::2] for item in text.split(",") if item)
    data = settings.pop("data", None)
    try:
        layout = LayoutConfig.model_validate(settings)
    except ValueError as error:
        raise ConfigError(
            f"{option}: is not a layout",
            found=f"{text[:80]}: {in_words(error)}",
            expected="for instance tensor=2,pipeline=1,zero=1",
        ) from error
    fits = make_layout(
        world=world,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        zero=layout.zero,
        key=option,
    )
    if data is not None and data != str(fits.data):
        raise ConfigError(
            f"{option}: data={data} does not fit",
            found=f"{world} processes, tensor {layout.tensor}, pipeline {layout.pipeline}",
            expected=f"data={fits.data}, or no data at all: it follows from the rest",
        )
    return layout


def _short(layout: LayoutConfig) -> str:
    settings = {**layout.model_dump(exclude_defaults=True), "zero": layout.zero}
    return ",".join(f"{key}={value}" for key, value in settings.items())


def model_for(
    parameters: float, *, operator: str, factor: int, family: str = "gpt2", vocab: int = 8192
) -> ModelConfig:
    """A model with at least this many parameters after an operator has grown it.

    Heads have width 64, and there is about one layer per 64 of hidden size, as in GPT-2 XL.
    """
    unit = 128 * factor  # so that tensor parallelism divides the small model's heads too
    hidden = max(1, round((parameters * 64 / 12) ** (1 / 3) / unit)) * unit
    depth = factor if operator.startswith("depth") else 1
    width = factor if operator.startswith("width") else 1
    layers = -(-max(0.0, parameters - vocab * hidden) // (12 * hidden**2 * depth)) * depth
    layers = max(int(layers), 2 * depth)
    return ModelConfig.model_validate(
        {
            "family": family,
            "layers": layers // depth,
            "hidden": hidden // width,
            "heads": hidden // 64 // width,
            "ffn": 4 * hidden // width,
            "sequence": 128,
            "vocab": vocab,
        }
    )


def config_for(case: Case, model: ModelConfig, *, world: int, staging_mib: float) -> Config:
    """A two-stage run with the growth between the stages."""
    grow = {"operator": case.operator, "factor": case.factor, "state_policy": case.policy}
    return parse_config(
        {
            "model": model.model_dump(mode="json", by_alias=True),
            "layout": case.old.model_dump(),
            "data": {"path": "none"},
            "batch": {"global": world, "micro": 1},
            "stages": [
                {"until": {"steps": STEPS_BEFORE}},
                {
                    "grow": grow,
                    "layout": case.new.model_dump(),
                    "until": {"steps": 2 * STEPS_BEFORE},
                },
            ],
            "schedule": {"warmup": 1},
            "growth": {"staging_mib": staging_mib},
        }
    )


def check(case: Case, model: ModelConfig, *, world: int) -> None:
    """Reject what cannot be measured before any process is started.

    Raises:
        ConfigError: the model does not divide over a layout.
        GrowthError: an operator or state policy is unknown or does not fit.
    """
    config = config_for(case, model, world=world, staging_mib=1.0)
    for stage in plan_run(config, world=world, vocabulary=None).stages:
        layout = stage.plan.layout
        require_tensor_parallel(
            stage.model, tensor=layout.tensor, sequence=layout.sequence_parallel
        )
