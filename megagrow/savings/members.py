"""The runs of a savings benchmark: their models, settings and directories."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megagrow.config import Config, ModelConfig
from megagrow.config.load import parse_config
from megagrow.errors import ConfigError
from megagrow.models.flops import matrix_parameters, train_flops_per_token
from megagrow.savings.config import SCRATCH, SMALL, ControlConfig, SavingsConfig, SweepConfig
from megagrow.savings.settings import (
    Settings,
    at_point,
    digest,
    merged,
    own_value,
    parsed,
    whole,
)
from megagrow.train.run_plan import Stage, plan_run, with_vocabulary

_NEVER = 10**9  # steps
# Unless `target.checkpoint` says otherwise: a leg that is stopped starts over, and the states from
# which branches start are kept.
_SAVES = {"every": _NEVER, "keep": 32}


@dataclass(frozen=True)
class Branch:
    """A run that branches off the stable phase and decays.

    Attributes:
        budget: FLOPs for which it was sized.
        start: step of the stable run from which it starts.
        end: its last step.
    """

    budget: float
    start: int
    end: int

    @property
    def decay(self) -> float:
        """The decay as a fraction of all steps, for `schedule.decay`."""
        return (self.end - self.start) / self.end


@dataclass(frozen=True)
class Member:
    """One model over all budgets: a stable run, and a branch for each budget.

    Attributes:
        name: of the variant or the control.
        seed: of everything random.
        point: values of the swept settings, by dotted name.
        directory: of its runs; different for different settings.
        settings: the run's configuration as plain data; the last stage has no `until`.
        watched: how often the stable run validates, and on how many samples; None: never.
        average: fraction of each decay over which weights are averaged; None: no averaging.
    """

    name: str
    seed: int
    point: Mapping[str, Any]
    directory: Path
    settings: Settings = field(repr=False)
    watched: tuple[int, int | None] | None = None
    average: float | None = None

    def trunk(self, steps: int, *, stop: int) -> Config:
        """The stable run with `steps` steps in all, stopping at `stop`."""
        train: Settings = {"stop_after_steps": stop, "validate_every": _NEVER}
        if self.watched is not None and self.watched[0]:
            points, samples = self.watched
            train["validate_every"] = max(1, round(steps / points))
            train |= {} if samples is None else {"validation_samples": samples}
        return self._config(
            "stable", until={"steps": steps}, schedule={"name": "constant"}, train=train
        )

    @property
    def run(self) -> str:
        """Its name, independent of the benchmark's directory."""
        return f"{self.name}/{self.directory.name}"

    def place(self, branch: Branch) -> Path:
        """The directory of a branch's run."""
        return self.directory / f"budget_{branch.budget:.4e}"

    def stable(self, branch: Branch) -> Path:
        """The directory of the stable run from which a branch starts.

        A budget added after its state was deleted has its own.
        """
        side = self.directory / f"stable_{branch.start}"
        return side if side.is_dir() else self.directory / "stable"

    def branch(self, branch: Branch) -> Config:
        """The run that decays."""
        train: Settings = {"validate_every": _NEVER}
        if self.average is not None:
            train["average"] = {"last": self.average * branch.decay}
        return self._config(
            self.place(branch).name,
            until={"steps": branch.end},
            schedule={"name": "wsd", "decay": branch.decay},
            train=train,
        )

    def stages(self, branch: Branch, *, world: int, vocab: int) -> Sequence[Stage]:
        """The stages of a branch's run."""
        return plan_run(self.branch(branch), world=world, vocabulary=vocab).stages

    def branches(
        self, budgets: Sequence[float], *, decay: float, world: int, vocab: int
    ) -> list[Branch]:
        """Where the stable run branches for each budget, by arithmetic.

        The decay is within the last growth stage and takes `decay` of the budget there, so that
        every variant decays over the same number of the target's steps.

        Raises:
            ConfigError: a budget ends before the last stage can hold its decay.
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
                    fix="grow earlier, or leave the budget out",
                )
            found.append(Branch(budget, start, end))
        return found

    def _config(self, directory: str, *, until: dict[str, Any], **sections: Any) -> Config:
        settings = merged({"checkpoint": _SAVES}, merged(self.settings, sections))
        settings["stages"][-1]["until"] = until
        settings["run"] = {"dir": str(self.directory / directory), "seed": self.seed}
        return parse_config(settings, source=f"savings: {self.name}")


class Members:
    """Builds the members of a benchmark.

    Args:
        config: the benchmark.
        world: number of processes per run.
        vocab: the dataset's vocabulary size.

    Attributes:
        budgets: FLOPs, ascending.
        smalls: the small models that are trained alone, by name: one for every distinct model that
            a variant starts with, and the configured controls.
        parameters: number of the target's parameters used in a matrix product.
    """

    def __init__(self, config: SavingsConfig, *, world: int, vocab: int) -> None:
        self.config, self.world, self.vocab = config, world, vocab
        target = self._model(config.target)
        self.parameters = matrix_parameters(target)
        self._flops_per_token = train_flops_per_token(target)
        each = self.parameters * self._flops_per_token
        given = config.budgets
        self.budgets = list(given.flops or [n * each for n in given.tokens_per_parameter or []])
        self.smalls = self._distinct()
        self._members: dict[str, Member] = {}
        self._branches: dict[tuple[Path, float | None], list[Branch]] = {}

    def tokens_per_parameter(self, budget: float) -> float:
        """Tokens per parameter of the target from scratch."""
        return budget / self._flops_per_token / self.parameters

    def start_of(self, variant: str) -> str:
        """The name of the control that a variant starts with."""
        model = self._model(self.settings(variant, {}, small=True))
        return next(name for name in self.smalls if self._model(self.settings(name, {})) == model)

    def settings(self, name: str, point: Mapping[str, Any], *, small: bool = False) -> Settings:
        """A run's settings: the target's, then the swept ones, then the variant's own.

        Args:
            name: `scratch`, a variant or a control.
            point: values of a sweep, by dotted name.
            small: for a variant, the settings of its first model alone.
        """
        settings = at_point(copy.deepcopy(self.config.target), point)
        stages: list[Settings] = [{}]
        if name in self.smalls:
            control = self.smalls[name]
            settings = at_point(merged(self.config.target, control.settings), point)
            settings = merged(settings, {"model": control.model})
        elif name in self.config.variants:
            variant = self.config.variants[name]
            settings = merged(settings, {"model": variant.model})
            if not small:
                settings = merged(settings, variant.settings)
                stages = [
                    stage.model_dump(exclude_unset=True, by_alias=True, mode="json")
                    for stage in variant.stages
                ]
        return {**settings, "stages": stages}

    def member(self, name: str, point: Mapping[str, Any], *, seed: int, budget: float) -> Member:
        """A run of the baseline (`scratch`), a variant or a control, for a budget.

        Members of two budgets share a directory, and with it their stable run, if all their
        settings agree.
        """
        own = budget if self._own_budget(name) else None
        key = json.dumps([name, point, seed, own], sort_keys=True)
        if key not in self._members:
            self._members[key] = self._make(name, point, seed, budget)
        return self._members[key]

    def _make(self, name: str, point: Mapping[str, Any], seed: int, budget: float) -> Member:
        settings = self.settings(name, point)
        for stage in settings["stages"]:
            share = stage.pop("share", None)
            if share is not None:
                stage["until"] = {"flops": share * budget}
        watched = None
        if seed == self.config.seeds[0] and name not in self.config.variants:
            watched = (self.config.curve.points, self.config.curve.samples)
        rate = whole(settings)["optimizer"]["lr"]
        place = f"lr_{rate:g}-seed_{seed}-{digest(settings)}"
        directory = Path(self.config.dir) / name / place
        return Member(name, seed, dict(point), directory, settings, watched, self.config.average)

    def branches(self, one: Member, budget: float) -> list[Branch]:
        """All branches of a member's stable run up to that of `budget`, which is the last."""
        own = self._own_budget(one.name)
        upto = [budget] if own else [b for b in self.budgets if b <= budget]
        key = (one.directory, budget)
        if key not in self._branches:
            self._branches[key] = one.branches(
                upto, decay=self.config.decay, world=self.world, vocab=self.vocab
            )
        return self._branches[key]

    def longest(self, one: Member, budget: float) -> int:
        """Number of steps of the stable run up to its last branch."""
        last = budget if self._own_budget(one.name) else self.budgets[-1]
        return self.branches(one, last)[-1].start

    def _own_budget(self, name: str) -> bool:
        """Whether each budget of a variant has its own stable run."""
        variant = self.config.variants.get(name)
        return variant is not None and any(stage.share for stage in variant.stages)

    def own(self, name: str, sweep: SweepConfig, *, key: str) -> Settings:
        """The values of the swept settings in a run without a sweep.

        Raises:
            ConfigError: there is no such setting, or the sweep does not include its value.
        """
        found = whole(self.settings(name, {}))
        return {
            setting: own_value(found, setting, values, key=key)
            for setting, values in sweep.values.items()
        }

    def _model(self, settings: Settings) -> ModelConfig:
        return with_vocabulary(parsed(settings), self.vocab).model

    def _distinct(self) -> dict[str, ControlConfig]:
        found = dict(self.config.controls)
        known = [self._model(merged(self.config.target, {"model": control.model}))
                 for control in found.values()]  # fmt: skip
        for variant in self.config.variants.values():
            model = self._model(merged(self.config.target, {"model": variant.model}))
            if model in known:
                continue
            known.append(model)
            name, number = f"{SMALL}_{model.layers}x{model.hidden}", 2
            plain = name
            while name in found:
                name, number = f"{plain}_{number}", number + 1
            found[name] = ControlConfig(model=variant.model)
        return found


def check(members: Members) -> None:
    """Plan every kind of member, so that invalid ones are rejected before anything runs.

    A variant must end at the target.  Only `norm_eps` may differ: a growth from hidden size H to H'
    that pads the stream with zeros multiplies it by H / H', since the mean square falls by the same
    factor.

    Raises:
        ConfigError: a variant does not end at the target, a swept setting is unknown or has another
            value in `target`, or a run is impossible.
        GrowthError: an operator or a state policy does not fit.
    """
    config = members.config
    if config.target.get("schedule", {}).get("warmup") is None:
        raise ConfigError(
            "target.schedule.warmup: is not given, so every budget would have another",
            expected="a number of steps",
            fix="set target.schedule.warmup",
        )
    for name, variant in config.variants.items():
        at = len(variant.stages) - 1
        own = variant.stages[at].model_dump(exclude_none=True).get("schedule", {})
        if "decay" in own:
            raise ConfigError(
                f"variants.{name}.stages[{at}].schedule.decay: the benchmark sets the last decay",
                fix="leave it out, and set decay of the benchmark",
            )
    ends: dict[str, list[Stage]] = {}
    for name in (SCRATCH, *config.variants, *members.smalls):
        for budget in members.budgets:
            one = members.member(name, {}, seed=config.seeds[0], budget=budget)
            branch = members.branches(one, budget)[-1]
            ends[name] = list(one.stages(branch, world=members.world, vocab=members.vocab))
    for name in (SCRATCH, *members.smalls):
        sweep, key = config.sweep_of(name)
        own, last = members.own(name, sweep, key=key), members.budgets[-1]
        for setting, values in sweep.values.items():
            for value in values:
                point = {**own, setting: value}
                one = members.member(name, point, seed=config.seeds[0], budget=last)
                members.branches(one, last)
    wanted = ends[SCRATCH][-1].model
    for name in config.variants:
        found = ends[name][-1].model
        if eps_follows_width(ends[name], wanted):
            found = found.model_copy(update={"norm_eps": wanted.norm_eps})
        if found != wanted:
            differs = [key for key, value in wanted.model_dump().items()
                       if value != found.model_dump()[key]]  # fmt: skip
            raise ConfigError(
                f"variants.{name}: does not grow to the target",
                found=", ".join(f"{key} {found.model_dump()[key]}" for key in differs),
                expected=", ".join(f"{key} {wanted.model_dump()[key]}" for key in differs),
            )


def eps_follows_width(stages: Sequence[Stage], target: ModelConfig) -> bool:
    """Whether every growth left `norm_eps` as it was or multiplied it by H / H'."""
    models = [stage.model for stage in stages]
    if models[0].norm_eps != target.norm_eps:
        return False
    return all(
        math.isclose(after.norm_eps, before.norm_eps, rel_tol=1e-9)
        or math.isclose(
            after.norm_eps, before.norm_eps * before.hidden / after.hidden, rel_tol=1e-9
        )
        for before, after in pairwise(models)
    )
