"""Summary of a run's log: curves, growth stages and totals.

The log is not trusted: a missing or non-numeric value leaves a gap in the report and is never an
error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megagrow.report.log import Line
from megagrow.report.step_facts import StepFacts
from megagrow.report.thin import EveryNth, Steps


@dataclass(frozen=True)
class Validation:
    """One validation."""

    step: int
    tokens: float
    flops: float
    loss: float
    stage: int


@dataclass(frozen=True)
class GrowthSummary:
    """One growth; `stage` is the stage that it leads to."""

    step: int
    tokens: float
    flops: float
    operator: str
    state_policy: str
    loss_before: float
    loss_after: float
    parameters_before: float
    parameters_after: float
    seconds: float
    bytes_moved: float
    peak_staging_bytes: float
    stage: int
    foretold: bool = False  # whether a mixing time is measured

    @property
    def jump(self) -> float:
        """Loss after minus loss before, on the same batch."""
        return self.loss_after - self.loss_before


@dataclass(frozen=True)
class Diagnosis:
    """Diagnostics of one update of a grown model (`event` growth_diagnostics): numbers by name."""

    step: int
    tokens: float
    values: dict[str, float]


@dataclass
class StageSummary:
    """One growth stage: its model, its data, and its losses."""

    index: int
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    parameters: float = math.nan
    steps: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0  # time in which the run was running, growth and validation included
    first_validation: float = math.nan
    last_validation: float = math.nan


@dataclass(frozen=True)
class Run:
    """The progress of a run so far.

    Attributes:
        steps: every step, or if there are too many, the extremes of each group of `steps_each`
            steps (`megagrow.report.thin`).
        means: one per group of steps; equal to `steps` if every step is kept.
        validations: all, or every `validations_each`-th and the last.
        diagnoses: likewise for growth diagnostics.
        mixing: mixing times in tokens, by the stage that the growth leads to.
        start: the run_start line; empty if there is none.
        end: the end line if the last job of the run exited by itself, at or before the run's end;
            else empty.
        last_step: the last step.
        last_validation: the last validation with a finite loss.
        total_steps: of the whole run, as last planned; None if the log does not say.
    """

    steps: tuple[StepFacts, ...]
    validations: tuple[Validation, ...]
    growths: tuple[GrowthSummary, ...]
    stages: tuple[StageSummary, ...]
    start: Line
    end: Line
    resumes: int
    means: tuple[StepFacts, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    mixing: Mapping[int, float] = field(default_factory=dict)
    steps_each: int = 1
    steps_counted: int = 0
    validations_each: int = 1
    last_step: StepFacts | None = None
    last_validation: Validation | None = None
    total_steps: int | None = None
    not_finite: int = 0  # steps whose loss is not a number
    first_not_finite: int | None = None
    useful_seconds: float = 0.0  # in steps that were kept
    elapsed_seconds: float = 0.0  # from the first line to the last, pauses included

    @property
    def goodput(self) -> float:
        """Share of the total time spent on steps that were kept; nan if unknown.

        The rest is start-up, validation, saving, growing, work lost by a kill, and the time in
        which the run was down.
        """
        known = self.useful_seconds > 0 and self.elapsed_seconds > 0
        return min(self.useful_seconds / self.elapsed_seconds, 1.0) if known else math.nan

    @property
    def seconds(self) -> float:
        """Time in which the run was running, without the time between a kill and the resume."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def at(self) -> int:
        """Number of completed steps."""
        done = self.last_step.step if self.last_step is not None else 0
        return _index(self.end.get("step"), done)

    @property
    def complete(self) -> bool:
        """Whether it reached its planned end."""
        if not self.end:
            return False
        if self.total_steps is not None:
            return self.at >= self.total_steps
        return self.end.get("reason") == "all stages done"

    @property
    def final_validation(self) -> float:
        """The validation loss after the run's last step; nan if there is none."""
        last = self.last_validation
        return last.loss if last is not None and last.step == self.at else math.nan


def summarize(lines: Iterable[Line], *, most: int | None = None) -> Run:
    """Compute the curves, stages and totals from a log's lines, in one pass.

    Args:
        most: maximum number of step groups and of validations to keep; totals count every line in
            any case. None keeps all of them.
    """
    steps, validations = Steps(most), EveryNth[Validation](most)
    diagnoses, mixing = EveryNth[Diagnosis](most), dict[int, float]()
    last_validation: Validation | None = None
    total: int | None = None
    growths: list[GrowthSummary] = []
    stages: dict[int, StageSummary] = {}
    start: Line = {}
    end: Line = {}
    resumes = 0
    useful, elapsed = 0.0, 0.0
    now, tokens, flops, clock = 0, 0.0, 0.0, math.nan
    for line in lines:
        event = line["event"]
        now = _index(line.get("growth_stage"), now)
        stage = stages.setdefault(now, StageSummary(now))
        if event == "end":
            end = line
        elif event in ("step", "resume"):
            end = {}  # it was resumed
        if event == "run_start":
            start = start or line
        if event in ("run_start", "resume", "end"):
            total = _index(line.get("total_steps"), -1 if total is None else total)
            total = None if total < 0 else total
        resumes += event == "resume"
        stage.model = _section(line, "model") or stage.model
        stage.layout = _section(line, "layout") or stage.layout

        before, clock = clock, _finite(number(line, "time"), clock)
        if clock > before:  # a clock that was set back is ignored
            elapsed += clock - before
            if event not in ("run_start", "resume"):
                stage.seconds += clock - before

        if event == "step":
            at = _index(line.get("step"), 0)
            step = StepFacts.read(partial(number, line), step=at, growth_stage=now)
            steps.add(step)
            if step.tokens > tokens and step.tokens_per_second > 0:
                useful += (step.tokens - tokens) / step.tokens_per_second
            stage.steps += 1
            stage.tokens += max(step.tokens - tokens, 0)
            stage.flops += max(step.flops - flops, 0)
        elif event == "validation":
            loss = number(line, "val_loss")
            at = _index(line.get("step"), 0)
            one = Validation(at, number(line, "tokens"), number(line, "flops"), loss, now)
            # A stage's first validation may share its step with the last one before the growth.
            before_it = validations.last
            if before_it is not None and (before_it.step, before_it.stage) == (at, now):
                validations.replace_last(one)
            else:
                validations.add(one)
            if math.isfinite(loss):
                last_validation = one
            if math.isnan(stage.first_validation):
                stage.first_validation = loss
            stage.last_validation = loss
        elif event == "growth":
            growths.append(_growth(line, now))
            stage.parameters = number(line, "parameters_after")
            earlier = stages.get(now - 1)
            if earlier is not None and math.isnan(earlier.parameters):
                earlier.parameters = number(line, "parameters_before")
        elif event == "growth_diagnostics":
            named = {
                key: number(line, key) for key in line if key not in ("step", "tokens", "time")
            }
            known = {key: value for key, value in named.items() if math.isfinite(value)}
            at = _index(line.get("step"), 0)
            diagnoses.add(Diagnosis(at, number(line, "tokens"), known))
        elif event == "mixing":
            mixing[now] = number(line, "mixing_tokens")
        elif math.isnan(stage.parameters):
            stage.parameters = number(line, "parameters")
        if event in ("step", "run_start", "resume"):
            # A run that starts from another run's checkpoint does not begin at 0.
            tokens = _finite(number(line, "tokens"), tokens)
            flops = _finite(number(line, "flops"), flops)
    return Run(
        steps=steps.kept(),
        means=steps.means(),
        steps_each=steps.size,
        steps_counted=steps.count,
        validations=validations.kept(),
        validations_each=validations.size,
        diagnoses=diagnoses.kept(),
        mixing=mixing,
        last_step=steps.last,
        last_validation=last_validation,
        total_steps=total,
        not_finite=steps.not_finite,
        first_not_finite=steps.first_not_finite,
        growths=tuple(growths),
        stages=tuple(stages[index] for index in sorted(stages)),
        start=start,
        end=end,
        resumes=resumes,
        useful_seconds=useful,
        elapsed_seconds=elapsed,
    )


def number(line: Line, key: str) -> float:
    """The number at `key`, or nan."""
    value = line.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return math.nan


def _growth(line: Line, stage: int) -> GrowthSummary:
    return GrowthSummary(
        step=_index(line.get("step"), 0),
        tokens=number(line, "tokens"),
        flops=number(line, "flops"),
        operator=str(line.get("operator", "growth")),
        state_policy=str(line.get("state_policy", "")),
        loss_before=number(line, "loss_before"),
        loss_after=number(line, "loss_after"),
        parameters_before=number(line, "parameters_before"),
        parameters_after=number(line, "parameters_after"),
        seconds=number(line, "seconds"),
        bytes_moved=number(line, "bytes_moved"),
        peak_staging_bytes=number(line, "peak_staging_bytes"),
        stage=stage,
        foretold=bool(_section(line, "foretold")),
    )


def _index(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _finite(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _section(line: Line, key: str) -> dict[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}
