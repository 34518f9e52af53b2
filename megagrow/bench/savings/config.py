"""What a savings benchmark is: the target, the budgets, the baseline's sweep, the variants."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagrow.config import Config, GrowConfig, LayoutConfig, UntilConfig
from megagrow.config.load import parse_config
from megagrow.config.section import Section
from megagrow.errors import ConfigError
from megagrow.train.plan import plan_run

SCRATCH, SMALL = "scratch", "small"
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Flops = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
# Sections of a run that the benchmark sets itself.
_OURS = ("run", "stages", "deepspeed")


class VariantStage(Section):
    """A growth stage; the last one has no `until`, since the budget ends it."""

    until: UntilConfig | None = None
    grow: GrowConfig | None = None
    layout: LayoutConfig | None = None


class VariantConfig(Section):
    """One way to grow to the target.

    Attributes:
        model: what of the first stage's model differs from the target's.
        stages: as in a run.
        settings: anything else that differs in this variant's runs, by section.
    """

    model: dict[str, Any]
    stages: Annotated[list[VariantStage], Field(min_length=2)]
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _only_the_last_is_open(self) -> VariantConfig:
        for index, stage in enumerate(self.stages):
            last = index + 1 == len(self.stages)
            if last != (stage.until is None):
                raise ValueError(
                    f"stages[{index}]: "
                    + ("the budget ends the last stage: leave `until` out" if last
                       else "say when the stage ends: until: {flops: 1e12}")
                )  # fmt: skip
        return self


class SweepConfig(Section):
    """The baseline's learning rates, and the budget at which the best is told (not charged)."""

    lr: Annotated[list[Rate], Field(min_length=1)]
    budget: Flops | None = None  # default: the largest


class SavingsConfig(Section):
    """A savings benchmark.

    Attributes:
        dir: where all its runs go.
        target: an ordinary run's configuration without stages; its model is the target.
        budgets: FLOPs at which a decay is completed and the loss compared.
        decay: fraction of a budget that the decay of the learning rate takes.
        sweep: the baseline's learning rates.
        seeds: the first is everybody's; the others are for the baseline and the finalists.
        finalists: how many of the best variants run with all seeds.
        small_controls: whose small models are trained alone: the best variant's or everyone's.
        variants: the ways to grow.
    """

    dir: str
    target: dict[str, Any]
    budgets: Annotated[list[Flops], Field(min_length=2)]
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    sweep: SweepConfig
    seeds: Annotated[list[Seed], Field(min_length=1)]
    finalists: Annotated[int, Field(ge=0)] = 1
    small_controls: Literal["best", "all"] = "best"
    variants: Annotated[dict[str, VariantConfig], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_order(self) -> SavingsConfig:
        if any(b <= a for a, b in zip(self.budgets, self.budgets[1:], strict=False)):
            raise ValueError("budgets: must rise from one to the next")
        if self.sweep.budget is not None and self.sweep.budget not in self.budgets:
            raise ValueError(f"sweep.budget: must be one of budgets, {self.budgets}")
        for name, values in (("sweep.lr", self.sweep.lr), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: names a value twice")
        for key in _OURS:
            if key in self.target:
                raise ValueError(f"target.{key}: the benchmark sets it; leave it out")
        for name in self.variants:
            if name == SCRATCH or name.startswith(SMALL) or not name.replace("_", "").isalnum():
                raise ValueError(
                    f"variants.{name}: a name of letters, digits and _, "
                    f"not {SCRATCH} and not beginning with {SMALL}"
                )
        return self

    @property
    def sweep_budget(self) -> float:
        """Where the sweep is decided."""
        return self.sweep.budget or self.budgets[-1]


@dataclass(frozen=True)
class Branch:
    """A run that leaves the stable phase and decays.

    Attributes:
        budget: FLOPs that it was sized to.
        start: step of the stable run from which it starts.
        end: its last step.
    """

    budget: float
    start: int
    end: int

    @property
    def decay(self) -> float:
        """The decay as a fraction of all steps, as `schedule.decay` wants it."""
        return (self.end - self.start) / self.end


@dataclass(frozen=True)
class Member:
    """One model's way through all budgets: a stable run, and a branch for each budget.

    Attributes:
        name: of the variant, or of a control.
        lr, seed: the learning rate's peak and the seed.
        directory: where its runs are.
        settings: the run's configuration as plain data; the last stage has no `until`.
    """

    name: str
    lr: float
    seed: int
    directory: Path
    settings: dict[str, Any]

    def trunk(self, steps: int, *, stop: int) -> Config:
        """The stable run, of `steps` in all, to stop at `stop`."""
        return self._config(
            "stable",
            until={"steps": steps},
            schedule={"name": "constant"},
            train={"stop_after_steps": stop},
        )

    def branch(self, branch: Branch) -> Config:
        """The run that decays."""
        return self._config(
            f"budget_{branch.budget:.3e}",
            until={"steps": branch.end},
            schedule={"name": "wsd", "decay": branch.decay},
        )

    def branches(
        self, budgets: list[float], *, decay: float, world: int, vocab: int
    ) -> list[Branch]:
        """Where the stable run is left for each budget, by arithmetic.

        The decay lies within the last growth stage and takes `decay` of the budget there, so
        every variant decays over the same number of the target's steps.

        Raises:
            ConfigError: a budget ends before the last stage has room for its decay.
        """
        config = self._config("stable", until={"flops": budgets[-1]}, schedule={"name": "constant"})
        last = plan_run(config, world=world, vocabulary=vocab).stages[-1].plan
        found = []
        for budget in budgets:
            end = last.start_step + round((budget - last.start_flops) / last.flops_per_step)
            start = end - max(1, round(decay * budget / last.flops_per_step))
            if start <= last.start_step:
                raise ConfigError(
                    f"{self.name}: no room for the decay of a budget after the last growth",
                    found=f"budget {budget:.3g} FLOPs, last growth at {last.start_flops:.3g}",
                    expected=f"a growth before {(1 - decay) * budget:.3g} FLOPs",
                    mend="grow earlier, or leave the budget out",
                )
            found.append(Branch(budget, start, end))
        return found

    def _config(self, directory: str, *, until: dict[str, Any], **sections: Any) -> Config:
        settings = copy.deepcopy(self.settings)
        settings["stages"][-1]["until"] = until
        settings["run"] = {"dir": str(self.directory / directory), "seed": self.seed}
        settings = _merged(settings, {"optimizer": {"lr": self.lr}, **sections})
        # Only ends are compared; the newest checkpoint is the one that branches off.
        return parse_config(settings, source=f"savings: {self.name}")


def member(config: SavingsConfig, name: str, *, lr: float, seed: int) -> Member:
    """The baseline (`scratch`), a variant by its name, or its small model alone (`small_NAME`)."""
    settings: dict[str, Any] = copy.deepcopy(config.target)
    stages: list[dict[str, Any]] = [{}]
    if name != SCRATCH:
        alone = name.startswith(SMALL)
        variant = config.variants[name.removeprefix(f"{SMALL}_") if alone else name]
        settings = _merged(settings, {**variant.settings, "model": variant.model})
        if not alone:
            stages = [stage.model_dump(exclude_none=True, by_alias=True)
                      for stage in variant.stages]  # fmt: skip
    settings["stages"] = stages
    directory = Path(config.dir) / name / f"lr_{lr:g}-seed_{seed}"
    return Member(name, lr, seed, directory, settings)


def check(config: SavingsConfig, *, world: int, vocab: int) -> dict[str, Member]:
    """Plan every kind of member, so that what cannot be is refused before anything runs.

    Returns:
        A member for each name: the baseline, the variants, their small models.

    Raises:
        ConfigError: a variant does not end at the target, or a run is not possible.
        GrowthError: an operator or a state policy does not fit.
    """
    names = [SCRATCH, *config.variants, *(f"{SMALL}_{name}" for name in config.variants)]
    members = {
        name: member(config, name, lr=config.sweep.lr[0], seed=config.seeds[0]) for name in names
    }
    ends = {}
    for name, one in members.items():
        plan = one.branches(list(config.budgets), decay=config.decay, world=world, vocab=vocab)
        run = plan_run(one.branch(plan[-1]), world=world, vocabulary=vocab)
        ends[name] = run.stages[-1].model
    for name in config.variants:
        wanted, found = ends[SCRATCH].model_dump(), ends[name].model_dump()
        # `width_fresh` scales the norms' eps with the stream.
        differs = [key for key in wanted if wanted[key] != found[key] and key != "norm_eps"]
        if differs:
            raise ConfigError(
                f"variants.{name}: does not grow to the target",
                found=", ".join(f"{key} {found[key]}" for key in differs),
                expected=", ".join(f"{key} {wanted[key]}" for key in differs),
            )
    return members


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of sections replaced one by one."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = (
            {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged
