"""What the log of a run amounts to: its curves, growth stages and totals.

The log is taken as it is found: a value that is missing or not a number
leaves a gap in the report and never stops it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megagrow.report.log import Line


@dataclass(frozen=True)
class Step:
    """One optimizer step (`event` step); values that were not logged are nan."""

    step: int
    tokens: float
    flops: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    stage: int


@dataclass(frozen=True)
class Validation:
    """One validation."""

    step: int
    tokens: float
    flops: float
    loss: float
    stage: int


@dataclass(frozen=True)
class Growth:
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

    @property
    def jump(self) -> float:
        """Loss after minus loss before, on the same batch."""
        return self.loss_after - self.loss_before


@dataclass
class Stage:
    """One growth stage: what it trained, on what, and how far the loss came."""

    index: int
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    parameters: float = math.nan
    steps: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0  # time in which the run was up, growth and validation included
    first_validation: float = math.nan
    last_validation: float = math.nan


@dataclass(frozen=True)
class Run:
    """A whole run."""

    steps: tuple[Step, ...]
    validations: tuple[Validation, ...]
    growths: tuple[Growth, ...]
    stages: tuple[Stage, ...]
    start: Line  # the run_start line; empty if there is none
    end: Line  # the end line if the run came to its end; else empty
    resumes: int
    useful_seconds: float = 0.0  # in steps that were kept
    elapsed_seconds: float = 0.0  # from the first line to the last, pauses included

    @property
    def goodput(self) -> float:
        """Share of all time that went into steps that were kept; nan where nothing is known.

        The rest is start-up, validation, saving, growing, work that a kill undid, and the time
        in which the run was down.
        """
        known = self.useful_seconds > 0 and self.elapsed_seconds > 0
        return min(self.useful_seconds / self.elapsed_seconds, 1.0) if known else math.nan

    @property
    def seconds(self) -> float:
        """Time in which the run was up; time between a kill and its resume is not in it."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def final_validation(self) -> float:
        """The last validation loss that is a number; nan if there is none."""
        finite = [v.loss for v in self.validations if math.isfinite(v.loss)]
        return finite[-1] if finite else math.nan

    @property
    def not_finite(self) -> tuple[Step, ...]:
        """Steps whose loss is not a number."""
        return tuple(s for s in self.steps if not math.isfinite(s.loss))


def summarize(lines: Iterable[Line]) -> Run:
    """Read the curves, stages and totals out of a log's lines."""
    steps: dict[int, Step] = {}
    # A stage's first validation may share its step with the last one before the growth.
    validations: dict[tuple[int, int], Validation] = {}
    growths: list[Growth] = []
    stages: dict[int, Stage] = {}
    start: Line = {}
    end: Line = {}
    resumes = 0
    useful, elapsed = 0.0, 0.0
    now, tokens, flops, clock = 0, 0.0, 0.0, math.nan
    for line in lines:
        event = line["event"]
        now = _index(line.get("growth_stage"), now)
        stage = stages.setdefault(now, Stage(now))
        if event == "end":
            end = line
        elif event in ("step", "resume"):
            end = {}  # it went on
        if event == "run_start":
            start = start or line
        resumes += event == "resume"
        stage.model = _section(line, "model") or stage.model
        stage.layout = _section(line, "layout") or stage.layout

        before, clock = clock, _finite(number(line, "time"), clock)
        if clock > before:  # a clock that was set back counts for nothing
            elapsed += clock - before
            if event not in ("run_start", "resume"):
                stage.seconds += clock - before

        if event == "step":
            step = Step(
                step=_index(line.get("step"), 0),
                tokens=number(line, "tokens"),
                flops=number(line, "flops"),
                loss=number(line, "loss"),
                lr=number(line, "lr"),
                grad_norm=number(line, "grad_norm"),
                tokens_per_second=number(line, "tokens_per_second"),
                stage=now,
            )
            steps[step.step] = step
            if step.tokens > tokens and step.tokens_per_second > 0:
                useful += (step.tokens - tokens) / step.tokens_per_second
            stage.steps += 1
            stage.tokens += max(step.tokens - tokens, 0)
            stage.flops += max(step.flops - flops, 0)
        elif event == "validation":
            loss = number(line, "val_loss")
            at = _index(line.get("step"), 0)
            validations[at, now] = Validation(
                at, number(line, "tokens"), number(line, "flops"), loss, now
            )
            if math.isnan(stage.first_validation):
                stage.first_validation = loss
            stage.last_validation = loss
        elif event == "growth":
            growths.append(_growth(line, now))
            stage.parameters = number(line, "parameters_after")
            earlier = stages.get(now - 1)
            if earlier is not None and math.isnan(earlier.parameters):
                earlier.parameters = number(line, "parameters_before")
        elif math.isnan(stage.parameters):
            stage.parameters = number(line, "parameters")
        if event in ("step", "run_start", "resume"):
            # A run that starts from another's checkpoint does not begin at nought.
            tokens = _finite(number(line, "tokens"), tokens)
            flops = _finite(number(line, "flops"), flops)
    return Run(
        steps=tuple(steps.values()),
        validations=tuple(validations.values()),
        growths=tuple(growths),
        stages=tuple(stages[index] for index in sorted(stages)),
        start=start,
        end=end,
        resumes=resumes,
        useful_seconds=useful,
        elapsed_seconds=elapsed,
    )


def number(line: Line, key: str) -> float:
    """The number at `key`; nan if there is none."""
    value = line.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return math.nan


def _growth(line: Line, stage: int) -> Growth:
    return Growth(
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
    )


def _index(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _finite(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _section(line: Line, key: str) -> dict[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}
