"""Configuration of a savings benchmark: target, budgets, sweeps, controls and variants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagrow.config import StageConfig, UntilConfig
from megagrow.config.section import PathText, Positive, Section

VERSION = 2  # of the benchmark's rules, and of its results
SCRATCH, SMALL = "scratch", "small"
Seed = Annotated[int, Field(ge=0, lt=2**63)]
AboveZero = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
RATE = "optimizer.lr"
# Sections of a run that the benchmark sets itself.
_OURS = ("run", "stages", "deepspeed")


class BudgetsConfig(Section):
    """Where runs end and are compared: in FLOPs, or in tokens per parameter of the target.

    The parameters are those used in a matrix product: the blocks' and the output head's, tied or
    not; tables that are only looked up are excluded.
    """

    flops: Annotated[list[AboveZero], Field(min_length=2)] | None = None
    tokens_per_parameter: Annotated[list[AboveZero], Field(min_length=2)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_of_flops(cls, data: Any) -> Any:
        return {"flops": data} if isinstance(data, list) else data

    @model_validator(mode="after")
    def _one_unit_in_order(self) -> BudgetsConfig:
        if (self.flops is None) == (self.tokens_per_parameter is None):
            raise ValueError("give flops or tokens_per_parameter, and not both")
        if any(b <= a for a, b in pairwise(self.values)):
            raise ValueError("must rise from one to the next")
        return self

    @property
    def values(self) -> list[float]:
        """The budgets, in the unit in which they were given."""
        return self.flops or self.tokens_per_parameter or []


class SweepConfig(Section):
    """Settings to tune: a list of values for each, by dotted name; tuning is not charged.

    In a file: ``sweep: {optimizer.lr: [2e-3, 4e-3], batch.global: [4, 8], budgets: [20]}``;
    ``lr`` is short for ``optimizer.lr``.

    Attributes:
        values: of each setting, by its dotted name.
        by: `coordinate` (one setting after another, the learning rate first, each at the best
            values of the others so far) or `grid` (every combination).
        rounds: maximum number of passes of `coordinate` over all settings; it stops as soon as a
            pass changes nothing.
        budgets: the budgets at which to sweep, in their unit; by default all.  A budget that is
            not listed uses the best of the next larger one that is, or of the largest.
        seeds: the mean loss over this many of the benchmark's first seeds decides.  What is best
            with one seed often is not with the next.
    """

    values: dict[str, Annotated[list[Any], Field(min_length=1)]]
    by: Literal["coordinate", "grid"] = "coordinate"
    rounds: Positive = 2
    budgets: list[AboveZero] | None = None
    seeds: Positive = 1

    @model_validator(mode="before")
    @classmethod
    def _settings_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        own = {key: data[key] for key in data if key in ("by", "rounds", "budgets", "seeds")}
        values = dict(data["values"]) if isinstance(data.get("values"), dict) else {}
        rest = {key: data[key] for key in data if key not in (*own, "values")}
        for name, found in _flat(rest):
            values[RATE if name == "lr" else name] = found
        return {**own, "values": values}

    @model_validator(mode="after")
    def _sound(self) -> SweepConfig:
        if not self.values:
            raise ValueError(f"names no setting; for instance {{{RATE}: [2.0e-3, 4.0e-3, 8.0e-3]}}")
        for name, values in self.values.items():
            if any(value in values[:at] for at, value in enumerate(values)):
                raise ValueError(f"{name}: names a value twice")
            if any(isinstance(value, dict) for value in values):
                raise ValueError(f"{name}: sweep what is in the section, {name}.KEY, instead")
        return self

    @property
    def names(self) -> list[str]:
        """The settings' names, the learning rate first."""
        return sorted(self.values, key=lambda name: name != RATE)


class VariantStage(StageConfig):
    """A stage of a run, with everything that a run's stage may set.

    Attributes:
        until: when it ends; the last one has none, since the budget ends it.
        share: the fraction of the budget at which it ends, instead of `until`; every budget then
            has its own stable phase.
    """

    until: UntilConfig | None = None  # type: ignore[assignment]
    share: Share | None = None


class VariantConfig(Section):
    """One way to grow to the target.

    Attributes:
        model: how the first stage's model differs from the target's.
        stages: as in a run.
        settings: other differences in this variant's runs, by section; applied before what the
            baseline's sweep found.
    """

    model: dict[str, Any]
    stages: Annotated[list[VariantStage], Field(min_length=2)]
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _only_the_last_is_open(self) -> VariantConfig:
        for index, stage in enumerate(self.stages):
            last = index + 1 == len(self.stages)
            if (stage.until is not None) + (stage.share is not None) != (not last):
                raise ValueError(
                    f"stages[{index}]: "
                    + ("the budget ends the last stage: leave `until` and `share` out" if last
                       else "say when the stage ends: until: {flops: 1e12}, or share: 0.25")
                )  # fmt: skip
        return self


class ControlConfig(Section):
    """A smaller model, trained without growth.

    Attributes:
        model: how it differs from the target's.
        settings: other differences, by section.
    """

    model: dict[str, Any]
    settings: dict[str, Any] = Field(default_factory=dict)


class CurveConfig(Section):
    """Validations along stable phases, from which the bound is computed.

    Attributes:
        points: validations per phase; 0 disables the bound.
        samples: per validation; by default as many as at the ends.
    """

    points: Annotated[int, Field(ge=0)] = 32
    samples: Positive | None = None


class SavingsConfig(Section):
    """A savings benchmark.

    Attributes:
        dir: the directory of all its runs.
        target: an ordinary run's configuration without stages; its model is the target.
        budgets: at each a decay is completed and the loss compared.
        decay: fraction of a budget that the decay of the learning rate takes.
        average: fraction of each decay, its last part, over which weights are averaged; all losses
            are then those of the mean weights.  By default those of the last weights.
        sweep: tunes the baseline, with the first seed or the first `sweep.seeds`.
        small_sweep: the same for the small models alone; by default the baseline's.
        seeds: the first tunes and chooses, and is in no mean; the others measure.  If sweeps use
            several seeds, some that measure have tuned the baseline and the small models, too.
        finalists: how many of the best variants of each budget run with the other seeds.
        variants: the ways to grow.  The model that each starts with is also a control.
        controls: additional smaller models that are trained without growth.
        curve: validations along the stable phases.
        keep_states: keep the newest state of stable phases, so that larger budgets can be added.
    """

    dir: PathText
    target: dict[str, Any]
    budgets: BudgetsConfig
    decay: Share = 0.2
    average: Annotated[float, Field(gt=0, le=1)] | None = None
    sweep: SweepConfig
    small_sweep: SweepConfig | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    finalists: Annotated[int, Field(ge=0)] = 1
    variants: Annotated[dict[str, VariantConfig], Field(min_length=1)]
    controls: dict[str, ControlConfig] = Field(default_factory=dict)
    curve: CurveConfig = CurveConfig()
    keep_states: bool = True

    @model_validator(mode="after")
    def _sound(self) -> SavingsConfig:
        for name, sweep in (("sweep", self.sweep), ("small_sweep", self.small_sweep)):
            for budget in (sweep.budgets if sweep is not None else None) or ():
                if budget not in self.budgets.values:
                    raise ValueError(f"{name}.budgets: {budget:g} is none of {self.budgets.values}")
            if sweep is not None and sweep.seeds > len(self.seeds):
                raise ValueError(f"{name}.seeds: {sweep.seeds} of {len(self.seeds)} seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: names a value twice")
        for key in _OURS:
            if key in self.target:
                raise ValueError(f"target.{key}: the benchmark sets it; leave it out")
        if isinstance(train := self.target.get("train"), dict) and "average" in train:
            raise ValueError("target.train.average: set average of the benchmark instead")
        names = [("variants", name) for name in self.variants]
        for section, name in [*names, *(("controls", name) for name in self.controls)]:
            fits = name.replace("_", "").isalnum() and name != SCRATCH
            if not fits or (section == "variants" and name.startswith(SMALL)):
                raise ValueError(
                    f"{section}.{name}: a name of letters, digits and _, "
                    f"not {SCRATCH}, and of a variant not beginning with {SMALL}"
                )
            if section == "controls" and not name.startswith(f"{SMALL}_"):
                raise ValueError(f"controls.{name}: must begin with {SMALL}_")
        return self

    @property
    def tuning_seeds(self) -> int:
        """How many of the first seeds decide the sweep that uses the most."""
        return max(sweep.seeds for sweep in (self.sweep, self.small_sweep) if sweep is not None)

    def sweep_of(self, name: str) -> tuple[SweepConfig, str]:
        """The sweep that tunes the baseline or a small model, and its key."""
        if name == SCRATCH or self.small_sweep is None:
            return self.sweep, "sweep"
        return self.small_sweep, "small_sweep"


def _flat(data: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections by their dotted names."""
    for name, value in data.items():
        whole = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict):
            yield from _flat(value, whole)
        else:
            yield whole, value
